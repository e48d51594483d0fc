"""Basic blocks of a kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from ..ptx.instructions import Instruction, Kernel


@dataclass
class Block:
    """Instructions without a branch or barrier between them, and how they end.

    kind: "fall" into the next block, or end with `last`: "branch" to targets[0], "table" branch to
    one of the targets, "return", "barrier". `full` and `masked` are its functions once translated.
    """

    index: int
    instructions: list[Instruction]
    counts: Counter[str]
    kind: Literal["fall", "branch", "table", "return", "barrier"] = "fall"
    last: Instruction | None = None
    targets: list[int] = field(default_factory=list)
    full: Callable[..., Any] | None = None
    masked: Callable[..., Any] | None = None

    @property
    def next(self) -> int:
        return self.index + 1


def _ends_block(ins: Instruction) -> bool:
    if ins.op in ("bar", "barrier"):
        return "warp" not in ins.mods
    return ins.op in ("bra", "brx", "ret", "exit")


def _targets(kernel: Kernel, ins: Instruction) -> list[int]:
    """The instructions that a branch leads to."""
    if ins.op == "bra":
        return [kernel.labels[ins.args[0][1]]]
    if ins.op == "brx":
        return [kernel.labels[label] for label in kernel.tables[ins.args[1][1]]]
    return []


def split(kernel: Kernel) -> list[Block]:
    """The blocks in their order; the last is empty and returns, for a label at the very end."""
    code = kernel.instructions
    starts = {0, len(code)}
    for i, ins in enumerate(code):
        starts.update(_targets(kernel, ins))
        if _ends_block(ins):
            starts.add(i + 1)
    order = sorted(starts)
    number = {start: b for b, start in enumerate(order)}
    blocks = []
    for start, end in pairwise(order):
        body = code[start:end]
        counts = Counter(ins.counted_as for ins in body)
        block = Block(number[start], body, counts)
        if _ends_block(body[-1]):
            block.last = body[-1]
            block.instructions = body[:-1]
            kinds = {"bra": "branch", "brx": "table", "ret": "return", "exit": "return"}
            block.kind = kinds.get(body[-1].op, "barrier")  # type: ignore[assignment]
            block.targets = [number[target] for target in _targets(kernel, body[-1])]
        blocks.append(block)
    return [*blocks, Block(len(blocks), [], Counter(), kind="return")]
