"""cp.async: copies from global to shared memory, whose data arrive at the wait."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import PTXError, Unsupported
from ..memory.layout import CHUNK, PENDING, SHIFT, take
from ..numbers.integers import U32
from .addressing import addresser, select


@dataclass(frozen=True)
class _Copy:
    """A cp.async in flight: where to (bytes of the batch), and the data read at its issue."""

    lanes: np.ndarray
    idx: np.ndarray
    data: np.ndarray
    group: np.ndarray
    size: int

    def part(self, of: np.ndarray) -> _Copy:
        """That of some of its lanes."""
        return _Copy(self.lanes[of], self.idx[of], self.data[of], self.group[of], self.size)


def cp_async(em, ins):
    """A copy, a commit_group or a wait for groups."""
    if "commit_group" in ins.mods:
        return _commit
    if "wait_group" in ins.mods:
        latest = ins.args[0][1]
        return lambda batch, r, q: _wait(batch, q, latest)
    if "wait_all" in ins.mods:
        return lambda batch, r, q: _wait(batch, q, -1)
    if "mbarrier" in ins.mods:
        raise Unsupported(ins.full)
    return _copy(em, ins)


def _commit(batch, r, q):
    batch.cp_committed = batch.cp_committed + (1 if q is None else q)


def _copy(em, ins):
    destination = addresser(em, ins.args[0], wide=False)
    source = addresser(em, ins.args[1], wide=True)
    size = ins.args[2][1]
    if size not in (4, 8, 16):
        raise Unsupported(f"copy of {size} bytes")
    if "cg" in ins.mods and size != 16:
        raise Unsupported("cp.async.cg takes 16 bytes")
    rest = ins.args[3:-1] if ins.has("L2::cache_hint") else ins.args[3:]
    read_bytes = _source_size(em, rest[0], size) if rest else None

    def run(batch, r, q):
        some = select(batch, q)
        lanes = np.arange(batch.lanes) if some is None else some
        if lanes.size == 0:
            return
        to, frm = take(destination(batch, r), some), take(source(batch, r), some)
        shared = batch.shared
        idx = shared.index(batch, to, size, some, "cp.async")
        if shared.check:
            rows, warps = batch.lane_row[lanes], batch.lane_warp[lanes]
            shared.check_write(batch, idx, size, lanes, rows, warps, None, PENDING)
        if read_bytes is None:
            data = batch.global_memory.load(batch, frm, size, some, "cp.async")
        else:
            data = _partly(batch, frm, size, lanes, some, take(read_bytes(batch, r), some))
        batch.cp_pending.append(_Copy(lanes, idx, data, batch.cp_committed[lanes], size))

    return run


def _source_size(em, op, size):
    """Function (batch, r) → how many bytes are read; the rest of a chunk is zero."""
    if op[0] == "i":
        return lambda batch, r: np.full(batch.lanes, op[1], U32)
    if op[0] != "r":
        raise Unsupported("source size")
    if em.kernel.regs[op[1]] == "pred":  # ignore-src
        return lambda batch, r: np.where(r[op[1]], 0, size).astype(U32)
    return lambda batch, r: r[op[1]]


def _partly(batch, addr, size, lanes, some, count):
    """Chunks of which the first `count` bytes are read."""
    if (count > size).any():
        raise PTXError(f"cp.async source size {int(count.max())} exceeds {size}")
    whole = count == size
    memory = batch.global_memory
    if whole.all():
        return memory.load(batch, addr, size, some, "cp.async")
    data = np.zeros(lanes.size, CHUNK[size])
    full = np.flatnonzero(whole)
    if full.size:
        data[full] = memory.load(batch, addr[full], size, lanes[full], "cp.async")
    raw = data.view(np.uint8).reshape(-1, size)
    for k in np.flatnonzero(~whole & (count > 0)):
        for b in range(int(count[k])):
            at = addr[k : k + 1] + np.uint64(b)
            raw[k, b] = memory.load(batch, at, 1, lanes[k : k + 1], "cp.async")[0]
    return data


def _wait(batch, q, latest):
    """Complete the copies of all but the `latest` committed groups; -1: uncommitted ones, too."""
    pending = []
    limit = batch.cp_committed - latest
    for copy in batch.cp_pending:
        done = copy.group < limit[copy.lanes]
        if q is not None:
            done &= q[copy.lanes]
        if not done.any():
            pending.append(copy)
            continue
        if not done.all():
            pending.append(copy.part(~done))
            copy = copy.part(done)
        _land(batch, copy)
    batch.cp_pending = pending


def _land(batch, copy):
    shared = batch.shared
    shared.views[copy.size][copy.idx >> SHIFT[copy.size]] = copy.data
    shared.nwritten += copy.size * copy.idx.size
    if shared.check:
        g = shared.granules_of(copy.idx, copy.size)
        shared.written_at[g] = shared.now
        shared.written_by[g] = batch.lane_warp[copy.lanes][:, None]
