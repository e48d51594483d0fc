"""Tensor memory of sm_100: 128 lanes × 512 columns of 32-bit cells in each CTA.

A product is computed when it is issued, but the cells that it writes stay hidden (they read as
NaN) until a tcgen05.commit after it arrives on its mbarrier, which happens when somebody waits for
that mbarrier, and until the reading warp is ordered after the arrival.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import OutOfBounds, PTXError, SharedRace
from .layout import POISON

LANES, COLUMNS = 128, 512
CELLS = LANES * COLUMNS
NAN = POISON["b32"]


class TensorMemory:
    """Cells of all CTAs of a batch, flat: (CTA · 128 + lane) · 512 + column."""

    def __init__(self, ctas: int, warps: int, check: bool) -> None:
        self.check = check  # report unordered accesses
        self.agent = warps  # the tensor core in the clocks of shared memory
        cells = ctas * CELLS
        self.value = np.full(cells, NAN, np.uint32)
        self.product = np.zeros(cells, np.int32)  # unfinished, that writes the cell
        self.written_at = np.zeros(cells, np.int32)
        self.written_by = np.zeros(cells, np.uint8)
        self.read_at = np.zeros(cells, np.int32)
        self.read_by = np.zeros(cells, np.uint8)
        self.allocated = np.zeros((ctas, COLUMNS), np.int32)  # first column + 1 of the allocation
        self.closed = np.zeros(ctas, bool)  # gave up the right to allocate
        self.products: list[Product] = []  # unfinished
        self.issued = 0
        self.stores: list[tuple[np.ndarray, np.ndarray]] = []  # (warps, cells) before wait::st
        self.loads: list[Load] = []  # before wait::ld


@dataclass
class Load:
    """A tcgen05.ld before its wait::ld."""

    warps: np.ndarray
    cells: np.ndarray
    regs: list[int | None]
    values: np.ndarray


@dataclass(eq=False)
class Product:
    """A tcgen05.mma before its commit arrives: the cells and shared bytes that it uses."""

    number: int
    lane: int
    cta: int
    accumulator: np.ndarray
    operand: np.ndarray | None
    shared: list[np.ndarray]


def tensor_memory_of(batch: Any) -> TensorMemory:
    """The batch's tensor memory, which is made when it is first used."""
    if batch.tensor is None:
        check = batch.opts.check_tensor and batch.shared.clocks
        batch.tensor = TensorMemory(batch.shared.ctas, batch.warps, check)
        batch.shared.has_tensor_core = True
    return batch.tensor


def check_allocated(batch, cta, columns, lane):
    """columns[n, k] of CTAs cta[n] must belong to an allocation; `lane` issues the access."""
    bad = (columns < 0) | (columns >= COLUMNS)
    if not bad.any():
        bad = batch.tensor.allocated[cta[:, None], columns] == 0
    if bad.any():
        k = int(np.flatnonzero(bad.any(1))[0])
        column = int(columns[k][bad[k]][0])
        message = f"tensor memory column {column} is not allocated"
        raise OutOfBounds(message, *batch.who(int(lane[k])))


def cells_of(batch, ins, addr, warps, lane_offsets, column_offsets):
    """Flat cells (warps, 32, registers) of a move by these warps of the batch (None: all)."""
    addr = addr.reshape(-1, 32)
    if warps is None:
        warps = np.arange(batch.lanes // 32)
    else:
        addr = addr[warps]
    if (addr != addr[:, :1]).any():
        raise PTXError(f"{ins.op}.{ins.mods[0]}: the address differs within a warp")
    first = addr[:, 0].astype(np.int64)
    cta, warp = warps // batch.warps, warps % batch.warps
    lane = (first >> 16)[:, None, None] + lane_offsets
    theirs = lane >> 5 == (warp % 4)[:, None, None]
    if not theirs.all():
        k = int(np.flatnonzero(~theirs.all((1, 2)))[0])
        low = 32 * int(warp[k] % 4)
        raise OutOfBounds(
            f"tensor memory lane {int(first[k]) >> 16}: warp {int(warp[k])} reaches lanes "
            f"{low} to {low + 31} only",
            *batch.who(int(warps[k]) * 32),
        )
    column = (first & 0xFFFF)[:, None, None] + column_offsets
    ends = np.stack([column.min((1, 2)), column.max((1, 2))], 1)
    check_allocated(batch, cta, ends, warps * 32)
    return (cta[:, None, None] * LANES + lane) * COLUMNS + column, warps


def known(batch, warps, agents):
    """``seen`` of warps of the batch for an array of agents of shape (warps, ...)."""
    cta, warp = warps // batch.warps, warps % batch.warps
    shape = (-1,) + (1,) * (agents.ndim - 1)
    return batch.shared.seen[cta.reshape(shape), warp.reshape(shape), agents]


def check_cells(batch, cells, warps, act, *, write):
    """Moves by `warps` (first axis of `cells`) must come after other warps' accesses.

    Returns which cells are not visible yet because a product writes them. SharedRace.
    """
    t = batch.tensor
    if not batch.shared.clocks:
        return t.product[cells] != 0
    at, by = t.written_at[cells], t.written_by[cells]
    late = (at > known(batch, warps, by)) & (at != 0)
    by_product = late & (by == t.agent)
    hidden = (t.product[cells] != 0) | by_product
    if not t.check:
        return hidden
    late &= ~by_product
    if write:
        late |= hidden
    if late.any():
        race(batch, cells, late, warps, act, by, ("a tcgen05.st", "wrote"), "writes")
    if write:
        by = t.read_by[cells]
        late = t.read_at[cells] > known(batch, warps, by)
        if late.any():
            race(batch, cells, late, warps, act, by, ("a tcgen05.ld", "read"), "reads")
    return hidden


def race(batch, cells, late, warps, act, by, move, verb):
    """Raise SharedRace for the first late cell; `verb`: what a product does to it, as `move`."""
    k = tuple(np.argwhere(late)[0])
    cell, agent = int(cells[k]), int(by[k])
    what = f"{move[0]} by warp {agent} {move[1]}"
    if agent == batch.tensor.agent:
        what = f"an unfinished product {verb}"
    raise SharedRace(
        f"{act} tensor memory (lane {cell // COLUMNS % LANES}, column {cell % COLUMNS}) that "
        f"{what}, with no wait and barrier in between",
        *batch.who(int(warps[k[0]]) * 32),
    )
