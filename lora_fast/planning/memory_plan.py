"""A plan: the bytes of a training step by part, and the changes that would reduce them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from .settings import Settings

GB = 1e9


@dataclass(frozen=True)
class Change:
    """One change of the settings, and the bytes that it would save."""

    what: str
    saves: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a training step by part. Prints as a table; ``to_dict()`` is for machines.

    ``parts`` adds up to ``total``. weights: by storage, frozen and, for ``full``, trained ones.
    adapters: what the method adds. gradients and optimizer: of all that trains. master weights: the
    float32 copy of a 16-bit ``full`` run. activations: saved
    for backward, with or without checkpointing; logits: with their log-softmax and its
    gradient.
    workspace: the buffer in which NF4 weights are decoded and two more of the largest activation,
    the temporary gradients of the backward pass. Not counted: the CUDA context and
    fragmentation, for which :mod:`lora_fast.planning.cards` sets a reserve aside.

    ``paged``: optimizer state that may move to the host, not in ``parts``. ``activations``: saved
    bytes ``with_checkpointing`` and ``without``; None, with a note, for models that cannot be
    traced. ``changes``: what single changes would save, the best first.
    """

    model: str
    settings: Settings
    parameters: int
    trainable: int
    parts: Mapping[str, int]
    activations: Mapping[str, int] | None
    paged: int = 0
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-compatible values."""
        return {**asdict(replace(self, parts=dict(self.parts))), "total": self.total}

    def __str__(self) -> str:
        rows = [*self.parts.items(), ("total", self.total)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {size / GB:9.3f} GB" for name, size in rows]
        return "\n".join([*lines, *self.notes])
