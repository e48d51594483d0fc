"""The passes of a launch, whose FLOPs and bytes traffic.py counts, and its arguments by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Pass:
    """Work of one kind of tiles. Bytes by argument; ``flops`` without padding."""

    name: str
    flops: int = 0
    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    loaded: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)

    def reads(self, argument: str, distinct: int, issued: int) -> None:
        self.read[argument] += distinct
        self.loaded[argument] += issued

    def writes(self, argument: str, count: int) -> None:
        """Every element is stored by one program."""
        self.written[argument] += count
        self.stored[argument] += count

    @property
    def bytes(self) -> int:
        return self.read.total() + self.written.total()


class Values:
    """The arguments of a launch by name; ``None`` where one is absent."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getitem__(self, name: str) -> Any:
        value = self._values.get(name)
        # A compile-time constant is wrapped if it is part of a member.
        return getattr(value, "value", value)

    def itemsize(self, name: str) -> int:
        return int(self._values[name].dtype.itemsize)

    def count(self, name: str) -> int:
        total = 1
        for extent in self._values[name].shape:
            total *= extent
        return total


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
