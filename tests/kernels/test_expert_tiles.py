"""The tiles of experts' rows: every row once, at its expert, without a look at the offsets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from machines import Executor

pytest.importorskip("triton")
import triton
import triton.language as tl
from lora_fast.kernels.expert_tiles import (
    expert_rows,
    expert_tile,
    experts_block,
    of_expert,
    programs,
)

BLOCK_M = 16


@triton.jit
def list_tiles(
    offsets_ptr, tiles_ptr, experts, M, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    tile = expert_tile(program, offsets_ptr, experts, M, BLOCK_M, BLOCK_E)
    row = of_expert(tiles_ptr, program, 3)
    tl.store(row, tile.index)
    tl.store(row + 1, tile.first)
    tl.store(row + 2, tile.stop)


@triton.jit
def list_rows(offsets_ptr, rows_ptr):
    expert = tl.program_id(0)
    start, stop = expert_rows(expert, offsets_ptr)
    tl.store(rows_ptr + 2 * expert, start)
    tl.store(rows_ptr + 2 * expert + 1, stop)


# Where the rows of each expert end, and the rows of the call.
CALLS: dict[str, tuple[Sequence[int], int]] = {
    "one expert": ([40], 40),
    "some without rows": ([0, 0, 17, 17, 33, 33], 33),
    "one row each": (range(1, 8), 7),
    "multiples of a tile": ([16, 48, 64], 64),
    "rows of no expert": ([5, 20, 21], 60),
    "no expert has rows": ([0, 0, 0], 18),
    "no rows": ([0, 0], 0),
    "many experts": ([7 * e for e in range(1, 102)], 707),
    "all in the last": ([0, 0, 0, 0, 100], 100),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("stops", "M"), CALLS.values(), ids=list(CALLS))
def test_every_row_is_in_one_tile(
    typical_executor: Executor, stops: Sequence[int], M: int, dtype: torch.dtype
) -> None:
    device, experts = typical_executor.device, len(stops)
    offsets = torch.tensor(stops, dtype=dtype, device=device)
    count = programs(M, experts, BLOCK_M)
    tiles = torch.full((count, 3), -1, dtype=torch.int64, device=device)
    list_tiles[(count,)](
        offsets, tiles, experts, M, BLOCK_M=BLOCK_M, BLOCK_E=experts_block(experts)
    )
    found: list[list[int]] = [[] for _ in range(experts + 1)]
    for index, first, stop in tiles.tolist():
        found[index] += range(first, min(first + BLOCK_M, stop))
    bounds = [0, *stops, M]
    assert found == [list(range(start, stop)) for start, stop in pairwise(bounds)]


@pytest.mark.interpreter
def test_all_rows_of_an_expert() -> None:
    rows = torch.full((3, 2), -1, dtype=torch.int32)
    list_rows[(3,)](torch.tensor([4, 4, 9]), rows)
    assert rows.tolist() == [[0, 4], [4, 4], [4, 9]]
