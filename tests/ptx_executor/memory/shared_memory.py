"""Shared memory of a batch of CTAs, with a shadow that finds races and uninitialised reads.

Agents are the warps of a CTA, then one for each warpgroup (wgmma reads shared memory
asynchronously; on sm_100 the first of them is the tensor core), then one for the bulk copies. A
granule remembers its last writer and, for each agent, its last read, with the times of both.
``seen[c, a, b]`` is the time up to which everything that agent b of CTA c did is ordered before
agent a's next access; barriers raise it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import Misaligned, OutOfBounds, PTXError, SharedRace, UninitialisedShared
from .clocks import Clock, join
from .global_memory import one_by_one
from .layout import (
    CHUNK,
    OWN,
    PENDING,
    POISON16,
    SHARED_BASE,
    SHIFT,
    as_bytes,
    host_buffer,
    take,
    views_of,
)
from .proxies import ProxyFences

_BARRIER = "with no barrier in between"


class SharedMemory:
    """`size` bytes for each CTA. `check`: report races; `clocks`: only know what is ordered."""

    def __init__(
        self, ctas: int, size: int, warps: int, granule: int, check: bool, clocks: bool = False
    ) -> None:
        self.ctas, self.size, self.warps = ctas, size, warps
        self.stride = max(1024, -(-size // 1024) * 1024)
        self.total = ctas * self.stride
        self.raw, _ = host_buffer(self.total)
        self.raw.view(np.uint16)[:] = POISON16
        self.views = views_of(self.raw)
        self.check = check
        self.clocks = check or clocks
        self.has_tensor_core = False
        self.far: dict[int, Clock | None] = {}  # warp of the batch → what it knows of other CTAs
        self.now = 1
        self.nread = self.nwritten = 0  # bytes
        self.agents = warps + -(-warps // 4) + 1
        self.copy_agent = self.agents - 1
        self.granule_shift = SHIFT[granule]
        if self.check:
            self.granules = self.total >> self.granule_shift
            self.written_at = np.zeros(self.granules, np.int32)
            self.written_by = np.zeros(self.granules, np.uint8)
            self.read_at = np.zeros(self.agents * self.granules, np.int32)
            self.fences = ProxyFences(ctas, warps)
        if self.clocks:
            self.seen = np.zeros((ctas, self.agents, self.agents), np.int32)
            own = np.arange(self.agents)
            self.seen[:, own, own] = OWN
            self.seen_flat = self.seen.reshape(-1)

    # -- addresses -----------------------------------------------------------------------------
    def index(self, batch, addr, size, lanes, what):
        """The byte of the batch's memory that every access begins at. OutOfBounds, Misaligned."""
        offset = addr - np.uint32(SHARED_BASE)
        outside = offset > np.uint32(max(self.size - size, 0))
        if outside.any() or self.size < size:
            k = int(outside.argmax()) if self.size >= size else 0
            raise OutOfBounds(
                f"shared {what} of {size} bytes out of bounds "
                f"(the kernel has {self.size} bytes at {SHARED_BASE:#x})",
                *batch.who(k, lanes),
                int(addr[k]),
            )
        misaligned = addr & np.uint32(size - 1)
        if misaligned.any():
            k = int(np.flatnonzero(misaligned)[0])
            message = f"misaligned shared {what} of {size} bytes"
            raise Misaligned(message, *batch.who(k, lanes), int(addr[k]))
        return offset + take(batch.lane_shared, lanes)

    def granules_of(self, idx, size):
        """Granules of every access, shape (accesses, granules)."""
        count = size >> self.granule_shift
        g = idx >> self.granule_shift
        return g[:, None] if count <= 1 else g[:, None] + np.arange(count, dtype=g.dtype)

    def address_of(self, granule: int) -> int:
        """The address of a granule in its CTA."""
        return (granule << self.granule_shift) % self.stride + SHARED_BASE

    def agent_name(self, agent: int) -> str:
        if agent < self.warps:
            return f"warp {agent}"
        if agent == self.copy_agent:
            return "a bulk copy"
        if self.has_tensor_core:
            return "tcgen05.mma"
        return f"wgmma of warpgroup {agent - self.warps}"

    # -- checks --------------------------------------------------------------------------------
    def fail(
        self,
        batch: Any,
        bad: np.ndarray,
        g: np.ndarray,
        lanes: np.ndarray | None,
        describe: Callable[[int], str],
        error: type[PTXError] = SharedRace,
    ) -> None:
        """Raise for the first access of which a granule is bad."""
        k, j = np.argwhere(bad)[0]
        granule = int(g[k, j])
        raise error(describe(granule), *batch.who(int(k), lanes), self.address_of(granule))

    def check_read(self, batch, idx, size, lanes, rows, agent):
        """Reads must come after the write; rows: index of seen[c, a, 0]; agent: who reads."""
        g = self.granules_of(idx, size)
        at, by = self.written_at[g], self.written_by[g]
        late = at > self.seen_flat[rows[:, None] + by]
        if late.any():
            self.fail(batch, late, g, lanes, lambda i: f"read of shared bytes {self.unread(i)}")
        if not at.all():
            never = "read of shared bytes that were never written"
            self.fail(batch, at == 0, g, lanes, lambda _: never, UninitialisedShared)
        self.read_at[(agent * self.granules)[:, None] + g] = self.now
        return g

    def unread(self, granule: int) -> str:
        """Why a granule must not be read."""
        by = self.agent_name(self.written_by[granule])
        if self.written_at[granule] >= PENDING:
            return f"while an asynchronous copy by {by} is in flight"
        return f"that {by} wrote {_BARRIER}"

    def check_write(self, batch, idx, size, lanes, rows, agent, new=None, time=None):
        """Writes must come after what was read and written before.

        Several warps may store `new` values that are equal to the old ones.
        """
        g = self.granules_of(idx, size)
        at = self.written_at[g]
        late = at > self.seen_flat[rows[:, None] + self.written_by[g]]
        if late.any() and new is not None:
            late &= (at >= PENDING) | self._changes(idx, size, new)
        if late.any():
            self.fail(
                batch, late, g, lanes, lambda i: f"write to shared bytes {self._unwritten(i)}"
            )
        for other in range(self.agents):
            late = self.read_at[other * self.granules + g] > self.seen_flat[rows + other][:, None]
            if late.any() and new is not None and other < self.warps:
                late &= self._changes(idx, size, new)
            if late.any():
                still = f"read {_BARRIER}" if other < self.warps else "is still reading"
                text = f"write to shared bytes that {self.agent_name(other)} {still}"
                self.fail(batch, late, g, lanes, lambda _, text=text: text)
        self.written_at[g] = self.now if time is None else time
        self.written_by[g] = agent[:, None]
        return g

    def _changes(self, idx, size, new):
        old = self.views[size][idx >> SHIFT[size]]
        return (as_bytes(old, idx.size, -1) != as_bytes(new, idx.size, -1)).any(1)[:, None]

    def _unwritten(self, granule: int) -> str:
        by = self.agent_name(self.written_by[granule])
        pending = self.written_at[granule] >= PENDING
        return f"that {by} is still copying to" if pending else f"that {by} wrote {_BARRIER}"

    # -- plain accesses ------------------------------------------------------------------------
    def load(self, batch, addr, size, lanes, what="load"):
        """The value of every access."""
        idx = self.index(batch, addr, size, lanes, what)
        if self.check:
            rows, agent = take(batch.lane_row, lanes), take(batch.lane_warp, lanes)
            self.check_read(batch, idx, size, lanes, rows, agent)
        self.nread += size * idx.size
        return self.views[size][idx >> SHIFT[size]]

    def store(self, batch, addr, size, values, lanes, what="store"):
        """Put every access's value."""
        idx = self.index(batch, addr, size, lanes, what)
        if self.check:
            rows, agent = take(batch.lane_row, lanes), take(batch.lane_warp, lanes)
            self.check_write(batch, idx, size, lanes, rows, agent, values)
        self.nwritten += size * idx.size
        self.views[size][idx >> SHIFT[size]] = values

    def atomic(self, batch, addr, size, lanes, function, operands):
        """Read, modify, write, one access after the other; returns the old values."""
        idx = self.index(batch, addr, size, lanes, "atomic")
        if self.check:
            g = self.granules_of(idx, size)
            never = self.written_at[g] == 0
            if never.any():
                text = "atomic on shared bytes that were never written"
                self.fail(batch, never, g, lanes, lambda _: text, UninitialisedShared)
            self.written_at[g] = self.now
        out = np.empty(idx.size, CHUNK[size])
        units, place = idx >> SHIFT[size], np.arange(idx.size)
        one_by_one(self.views[size], units, place, function, operands, out)
        return out

    # -- ordering ------------------------------------------------------------------------------
    @property
    def clock_size(self) -> int:
        """Of the clocks that mbarriers pass on: times of agents, then those that are fenced."""
        return self.agents + self.warps

    def known_to(self, cta: int, warp: int) -> np.ndarray:
        """The clock of a warp that signals: all that it knows, itself included."""
        clock = np.zeros(self.clock_size, np.int32)
        clock[: self.agents] = np.where(self.seen[cta, warp] >= OWN, 0, self.seen[cta, warp])
        clock[warp] = self.now
        if self.check:
            clock[self.agents :] = self.fences.fenced[cta, warp]
        return clock

    def learn(self, cta: int, warp: int, clock: np.ndarray) -> None:
        """Let a warp know what a clock knows."""
        row = self.seen[cta, warp]
        own = row[warp]
        row[:] = np.maximum(row, clock[: self.agents])
        row[warp] = own
        if self.check:
            fenced = self.fences.fenced[cta, warp]
            fenced[:] = np.maximum(fenced, clock[self.agents :])

    def fence_proxies(self, cta: int, warp: int, *, whole: bool) -> None:
        """fence.proxy.async by a warp, or a part of it."""
        if self.check:
            seen = self.seen[cta, warp, : self.warps]
            self.fences.fence(seen, self.now, cta, warp, whole=whole)

    def check_fenced(self, batch: Any, ins: Any, g: np.ndarray, limit: Any, *where: Any) -> None:
        """Report granules that were written through the other proxy and are not fenced."""
        missing = self.fences.missing(self.written_at[g], self.written_by[g], limit)
        if missing.any():
            granule = int(g[tuple(np.argwhere(missing)[0])])
            by = self.agent_name(self.written_by[granule])
            batch.missing_fence(ins, by, *where, self.address_of(granule))

    def barrier(self, ctas: Sequence[int] | None = None, warps: list[int] | None = None) -> None:
        """All warps of these CTAs (None: all), or these of them, meet."""
        if not self.clocks:
            return
        if self.far:
            self._share_far(range(self.ctas) if ctas is None else ctas, warps)
        which: Any = slice(None) if ctas is None else ctas
        if self.check:
            self.fences.barrier(which, warps, self.now)
        if warps is None:
            row = self.seen[which][:, : self.warps].max(axis=1)  # (CTAs, agents)
            row[:, : self.warps] = self.now
            rows = np.repeat(row[:, None, :], self.warps, axis=1)
            own = np.arange(self.warps)
            rows[:, own, own] = OWN
            self.seen[which, : self.warps] = rows
        else:
            for c in ctas or ():
                known = self.seen[c, warps]
                row = np.where(known >= OWN, 0, known).max(axis=0)
                row[warps] = self.now
                for w in warps:
                    own = self.seen[c, w, w]
                    self.seen[c, w] = row
                    self.seen[c, w, w] = own
        self.now += 1

    def _share_far(self, ctas: Sequence[int], warps: list[int] | None) -> None:
        for c in ctas:
            here = [c * self.warps + w for w in (range(self.warps) if warps is None else warps)]
            known = {id(clock): clock for clock in map(self.far.get, here)}
            joined: Clock | None = None
            for clock in known.values():
                joined = join(joined, clock)
            if joined is not None:
                self.far.update(dict.fromkeys(here, joined))
