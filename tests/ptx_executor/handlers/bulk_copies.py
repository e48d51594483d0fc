"""cp.async.bulk.tensor (TMA): tiles between global and shared memory.

A load reads at its issue and lands when its mbarrier is waited for. A store writes at its issue;
its source is free after a wait_group, and other CTAs may rely on it after one without .read.
"""

from __future__ import annotations

import numpy as np

from ..errors import Misaligned, PTXError, Unsupported
from ..memory.layout import CHUNK, PENDING, SHARED_BASE
from ..numbers.float_formats import F32, tf32_rn
from ..numbers.integers import UNSIGNED
from .addressing import addresser, of_thread
from .atomics import ATOMIC_OPS, atomic_function
from .tensor_maps import ELEMENT_TYPE, NANS, TF32, read_map


def bulk(em, ins):
    """A tensor copy, commit_group or wait_group."""
    mods = ins.mods
    if "commit_group" in mods:
        return _commit
    if "wait_group" in mods:
        latest, performs = ins.args[0][1], "read" not in mods
        return lambda batch, r, q: _wait(batch, q, latest, performs=performs)
    if not ins.has("tensor") or ins.has("im2col", "multicast::cluster", "cta_group::2"):
        raise Unsupported(ins.full)
    first_shared = next(i for i, mod in enumerate(mods) if mod.startswith("shared::"))
    is_load = "global" in mods and mods.index("global") > first_shared
    return _load(em, ins) if is_load else _store(em, ins)


def _commit(batch, r, q):
    batch.bulk_committed = batch.bulk_committed + (1 if q is None else q)


class _Tile:
    """What a copy by one lane touches."""

    def __init__(self, batch, lane, tensor_map, base, coords):
        self.map = read_map(batch, tensor_map, lane)
        shared = batch.shared
        where = *batch.who(lane), base
        if base % 128:
            raise Misaligned("bulk tensor copy: shared address not 128 byte aligned", *where)
        offsets = self.map.in_shared(base) - SHARED_BASE
        if offsets.min() < 0 or offsets.max() + 16 > shared.size:
            raise PTXError("bulk tensor copy outside shared memory", *where)
        self.idx = (offsets + lane // batch.threads * shared.stride).reshape(-1)
        addr, inside = self.map.in_global(coords)
        self.inside = np.flatnonzero(inside)
        self.addr = addr[self.inside]
        self.lane = lane
        self.lanes = np.full(self.inside.size, lane)
        # For SharedMemory's checks: every chunk is the copy engine's, who asks is the lane's warp.
        self.chunk_lanes = np.full(self.idx.size, lane)
        self.rows = np.full(self.idx.size, batch.lane_row[lane])
        self.agent = np.full(self.idx.size, shared.copy_agent)


def _tiles(em, tensor_map, smem):
    """Function (batch, r, q) → the tile of every lane that executes."""
    shared_address = addresser(em, smem, wide=False)
    map_address = addresser(em, ("m", tensor_map[1], tensor_map[2], ()), wide=True)
    coords = tensor_map[3][0][1]

    def find(batch, r, q):
        lanes = range(batch.lanes) if q is None else map(int, np.flatnonzero(q))
        bases, maps = shared_address(batch, r), map_address(batch, r)
        for lane in lanes:
            at = [_signed(of_thread(coord, r, lane)) for coord in coords]
            yield _Tile(batch, lane, int(maps[lane]), int(bases[lane]), at)

    return find


def _signed(value):
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _load(em, ins):
    smem, tensor_map, barrier = ins.args[:3]
    find = _tiles(em, tensor_map, smem)
    barrier_address = addresser(em, barrier, wide=False)

    def run(batch, r, q):
        shared = batch.shared
        for tile in find(batch, r, q):
            data = _read(batch, tile)
            if shared.check:
                who = tile.chunk_lanes, tile.rows, tile.agent
                shared.check_write(batch, tile.idx, 16, *who, None, PENDING)
            lanes = np.array([tile.lane])
            addr = barrier_address(batch, r)[lanes]
            place = int(shared.index(batch, addr, 8, lanes, "mbarrier")[0])
            batch.mbarrier(place, tile.lane).copies.append((tile.idx, data.view(CHUNK[16])))

    return run


def _read(batch, tile):
    size, element = tile.map.element_bytes, tile.map.element
    data = np.zeros(tile.map.nbytes // size, UNSIGNED[size])
    if tile.map.fill and element in NANS:
        data[:] = NANS[element]
    if tile.inside.size:
        what = tile.addr, size, tile.lanes, "bulk tensor load"
        data[tile.inside] = batch.global_memory.load(batch, *what)
    return tf32_rn(data.view(F32)) if element in TF32 else data


def _store(em, ins):
    tensor_map, smem = ins.args[:2]
    find = _tiles(em, tensor_map, smem)
    op = next((mod for mod in ins.mods if mod in ATOMIC_OPS), None) if ins.has("reduce") else None

    def run(batch, r, q):
        shared = batch.shared
        for tile in find(batch, r, q):
            granules = None
            if shared.check:
                who = tile.chunk_lanes, tile.rows, tile.agent
                granules = shared.check_read(batch, tile.idx, 16, *who)
                fenced = shared.fences.fenced[divmod(tile.lane // 32, batch.warps)]
                where = batch.who(tile.lane)
                shared.check_fenced(batch, ins, granules, lambda by, f=fenced: f[by], *where)
                shared.read_at[shared.copy_agent * shared.granules + granules] = PENDING
            size = tile.map.element_bytes
            data = shared.views[16][tile.idx >> 4].view(UNSIGNED[size])[tile.inside]
            shared.nread += 16 * tile.idx.size
            _write(batch, tile, data, op)
            group = int(batch.bulk_committed[tile.lane])
            batch.bulk_pending.append((tile.lane, group, granules))
            order = batch.global_memory.order
            if order is not None and tile.inside.size:
                what = tile.addr, size, tile.lanes, "bulk tensor store"
                for region, _, idx in batch.global_memory.locate(batch, *what):
                    written = order.pending(region, idx, size)
                    batch.bulk_writes.append((tile.lane, group, *written))

    return run


def _write(batch, tile, data, op):
    memory, size = batch.global_memory, tile.map.element_bytes
    if op is not None:
        function = atomic_function(op, ELEMENT_TYPE[tile.map.element])
        memory.atomic(batch, tile.addr, size, tile.lanes, function, [data])
    elif tile.inside.size:
        memory.store(batch, tile.addr, size, data, tile.lanes, "bulk tensor store")


def _wait(batch, q, latest, *, performs):
    """Let the sources of all but the `latest` groups be free, and their writes be `performed`."""
    shared = batch.shared

    def is_done(lane, group):
        return (q is None or q[lane]) and group < int(batch.bulk_committed[lane]) - latest

    pending = []
    for lane, group, granules in batch.bulk_pending:
        if not is_done(lane, group):
            pending.append((lane, group, granules))
        elif granules is not None:
            shared.read_at[shared.copy_agent * shared.granules + granules] = shared.now
            cta, warp = divmod(lane // 32, batch.warps)
            shared.seen[cta, warp, shared.copy_agent] = shared.now
    batch.bulk_pending = pending
    if performs:
        writes = []
        for lane, group, stored_at, granules in batch.bulk_writes:
            if is_done(lane, group):
                stored_at[granules[stored_at[granules] == PENDING]] = shared.now
            else:
                writes.append((lane, group, stored_at, granules))
        batch.bulk_writes = writes
