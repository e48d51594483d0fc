"""Which rows of which expert a program computes, found on the device: nothing waits for the counts.

The rows of a call are sorted by expert, and offsets[e] is where those of expert e end. Its first
tile is that of program e + ⌊start / BLOCK_M⌋, which needs no sum over the experts before it; the
next expert's is far enough away, since

    1 + ⌊stop / BLOCK_M⌋ - ⌊start / BLOCK_M⌋ ≥ ⌈(stop - start) / BLOCK_M⌉

A launch has E + 1 + ⌊P / BLOCK_M⌋ programs for each block of columns. Those beyond an expert's
rows have nothing to do; the last ones get the rows that belong to no expert.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import triton_version  # noqa: F401


class ExpertTile(NamedTuple):
    """Rows [first, stop) of expert `index`, which is E for those of no expert; a tile is their
    first BLOCK_M. An empty one has first ≥ stop."""

    index: Any
    first: Any
    stop: Any


@triton.jit
def _start_of(index, offsets_ptr):
    """Where the expert before ends."""
    before = tl.load(offsets_ptr + tl.maximum(index - 1, 0)).to(tl.int32)
    return tl.where(index > 0, before, 0)


@triton.jit
def expert_tile(
    program, offsets_ptr, experts, M, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """The ExpertTile of a program, for M rows; BLOCK_E is at least the number of experts."""
    offs_e = tl.arange(0, BLOCK_E)
    inside = offs_e < experts
    stops = tl.load(offsets_ptr + offs_e, mask=inside, other=0).to(tl.int32)
    following = offs_e + 1 + stops // BLOCK_M
    index = tl.sum((inside & (following <= program)).to(tl.int32), 0)
    start = _start_of(index, offsets_ptr)
    stop = tl.load(offsets_ptr + tl.minimum(index, experts - 1)).to(tl.int32)
    stop = tl.where(index < experts, stop, M)
    first = start + (program - index - start // BLOCK_M) * BLOCK_M
    return ExpertTile(index, first, stop)


@triton.jit
def expert_rows(expert, offsets_ptr):
    """[start, stop) of all rows of an expert."""
    return _start_of(expert, offsets_ptr), tl.load(offsets_ptr + expert).to(tl.int32)


@triton.jit
def of_expert(ptr, expert, stride):
    """The pointer to an expert's matrix or vector, None where there is none."""
    if ptr is None:
        # Before 3.7, Triton has no functions that return the value None.
        return
    else:
        return ptr + tl.cast(expert, tl.int64) * stride


def programs(M, experts, BLOCK_M):
    """Programs of a launch for each block of columns."""
    return experts + 1 + M // BLOCK_M


def experts_block(experts):
    """BLOCK_E: a power of two of experts."""
    return triton.next_power_of_2(experts)
