"""A decoded kernel: its instructions, parameters and variables."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from .types import FLOATS, TYPE_SIZE

Operand = tuple[Any, ...]  # see operands.py

SPACES = ("global", "shared", "param", "local", "const")
# Instructions that are counted without their type.
_UNTYPED = {"mbarrier", "fence", "bar", "shfl", "vote", "redux", "tensormap", "cvt", "mov", "bra"}
_UNTYPED |= {"setp", "selp", "set", "slct"}


class Instruction:
    """One instruction: ``@pred op.mods args``.

    `text` is its source, `line` its line in the PTX, `loc` (file, line) of the Python code that it
    was compiled from, `pred` (register, negated) or None, `counted_as` its class in the counts.
    """

    __slots__ = ("args", "counted_as", "full", "line", "loc", "mods", "op", "pred", "text")

    def __init__(
        self,
        full: str,
        args: list[Operand],
        pred: tuple[int, bool] | None,
        text: str,
        loc: tuple[str, int] | None,
        line: int,
    ) -> None:
        self.full = full
        parts = re.split(r"\.(?!:)", full.replace("::", "\0"))
        self.op, *self.mods = (part.replace("\0", "::") for part in parts)
        self.args = args
        self.pred = pred
        self.text = text
        self.loc = loc
        self.line = line
        self.counted_as = _counted_as(self.op, self.mods)

    def where(self) -> str:
        """The line of the PTX and, where the compiler kept it, of the source."""
        source = f", {self.loc[0]}:{self.loc[1]}" if self.loc else ""
        return f"PTX line {self.line}{source}"

    def has(self, *mods: str) -> bool:
        """Whether any of these modifiers is there."""
        return any(mod in self.mods for mod in mods)

    def in_space(self, space: str) -> bool:
        """Whether the access is of this state space: ``.shared``, ``.shared::cta``."""
        return any(mod == space or mod.startswith(space + "::") for mod in self.mods)

    def types(self) -> list[str]:
        """Its type modifiers, in order."""
        return [mod for mod in self.mods if mod in TYPE_SIZE]

    def width(self) -> int:
        """Elements of a vector access."""
        return next((int(mod[1]) for mod in self.mods if mod in ("v2", "v4", "v8")), 1)

    def __repr__(self) -> str:
        return f"<{self.text}>"


def _counted_as(op: str, mods: list[str]) -> str:
    if op == "cp":
        return "cp.async.bulk" if "bulk" in mods else "cp.async"
    if op in ("ld", "st", "ldu", "red", "atom", "multimem"):
        names = (space for space in SPACES if any(m.split("::")[0] == space for m in mods))
        return f"{op}.{next(names, 'generic')}"
    if op in ("tcgen05", "wgmma"):
        return f"{op}.{mods[0]}"
    if op == "barrier":
        return "bar"
    if op not in _UNTYPED and mods and mods[-1] in FLOATS and op != "mma":
        return f"{op}.{mods[-1]}"
    return op


@dataclass
class Param:
    """A parameter of a kernel: `count` values of `type` at a byte offset."""

    name: str
    type: str
    count: int
    align: int
    offset: int = 0

    @property
    def size(self) -> int:
        return TYPE_SIZE[self.type] * self.count


@dataclass(frozen=True)
class Variable:
    """A .shared, .global, .const or .local variable of a module or a kernel."""

    name: str
    space: str
    size: int
    align: int
    extern: bool
    init: bytes | None


@dataclass
class Kernel:
    """An .entry function."""

    name: str
    params: list[Param]
    threads: int | None = None  # .reqntid or .maxntid
    regs: list[str] = field(default_factory=list)  # how every register is stored
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # unique label → instruction
    tables: dict[str, list[str]] = field(default_factory=dict)  # .branchtargets → unique labels
    variables: dict[str, Variable] = field(default_factory=dict)


@dataclass
class Module:
    """A PTX file."""

    kernels: dict[str, Kernel] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
