"""tcgen05.alloc, dealloc and relinquish_alloc_permit: columns of tensor memory."""

from __future__ import annotations

import numpy as np

from ..errors import PTXError, Unsupported
from ..memory.tensor_memory import CELLS, COLUMNS, LANES, NAN, check_cells, tensor_memory_of
from ..numbers.integers import U32
from .addressing import addresser, of_thread
from .warps import warps_of


def _each(batch, q, ins):
    """The first lane of every warp that executes."""
    warps = warps_of(batch, q, ins)
    for bw in range(batch.lanes // 32) if warps is None else map(int, warps):
        yield bw * 32


def alloc(em, ins):
    """Columns that nobody has; their number goes to shared memory."""
    if ins.has("cta_group::2"):
        raise Unsupported(ins.full)
    address = addresser(em, ins.args[0], wide=False)

    def run(batch, r, q):
        t = tensor_memory_of(batch)
        addr = address(batch, r)
        for lane in _each(batch, q, ins):
            cta, where = lane // batch.threads, batch.who(lane)
            column = _free(t, cta, of_thread(ins.args[1], r, lane), where)
            lanes, value = np.array([lane]), np.array([column], U32)
            batch.shared.store(batch, addr[lanes], 4, value, lanes, "tcgen05.alloc")

    return run


def _free(t, cta, count, where):
    """Allocate `count` columns of a CTA."""
    if count < 32 or count > COLUMNS or count & (count - 1):
        raise PTXError(
            f"tcgen05.alloc of {count} columns (a power of two from 32 to 512 is needed)", *where
        )
    if t.closed[cta]:
        raise PTXError("tcgen05.alloc after relinquish_alloc_permit", *where)
    taken = t.allocated[cta].reshape(-1, count).any(1)
    if taken.all():
        free = int((t.allocated[cta] == 0).sum())
        text = f"tcgen05.alloc of {count} columns waits for ever: {free} of 512 are free"
        raise PTXError(text, *where)
    column = int(np.flatnonzero(~taken)[0]) * count
    t.allocated[cta, column : column + count] = column + 1
    t.value.reshape(-1, LANES, COLUMNS)[cta, :, column : column + count] = NAN
    return column


def dealloc(em, ins):
    """Give an allocation back."""
    if ins.has("cta_group::2"):
        raise Unsupported(ins.full)

    def run(batch, r, q):
        t = tensor_memory_of(batch)
        for lane in _each(batch, q, ins):
            cta, where = lane // batch.threads, batch.who(lane)
            first, count = (of_thread(op, r, lane) for op in ins.args)
            owner = t.allocated[cta]
            mine = first < COLUMNS and (owner[first : first + count] == first + 1).all()
            if not mine or (owner == first + 1).sum() != count:
                raise PTXError(
                    f"tcgen05.dealloc of {count} columns at {first:#x}, "
                    "which no tcgen05.alloc returned",
                    *where,
                )
            if any(product.cta == cta for product in t.products):
                raise PTXError("tcgen05.dealloc while a tcgen05.mma is unfinished", *where)
            rows = cta * CELLS + np.arange(LANES)[:, None] * COLUMNS
            cells = (rows + np.arange(first, first + count))[None]
            warp = np.array([lane // 32])
            check_cells(batch, cells, warp, "tcgen05.dealloc frees", write=True)
            owner[first : first + count] = 0

    return run


def relinquish(em, ins):
    """The CTA allocates no more."""

    def run(batch, r, q):
        t = tensor_memory_of(batch)
        for lane in _each(batch, q, ins):
            t.closed[lane // batch.threads] = True

    return run
