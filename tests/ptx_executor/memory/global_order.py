"""Races in global memory: what no chain of barriers and release/acquire pairs orders.

Every warp of the launch has a number, CTA · warps of a CTA + warp. What a warp did up to some time
is ordered before what another warp does next when a chain of barriers within CTAs and of
release/acquire pairs between CTAs leads from one to the other. Within a CTA the matrix ``seen`` of
shared memory holds that; what a warp knows of other CTAs is a Clock, ``SharedMemory.far``.

Of every granule of global memory are remembered the last plain store (warp, time), the plain loads
since, and the strong (atomic, relaxed, release) writes.
"""

from __future__ import annotations

import numpy as np

from ..errors import GlobalRace
from .access_sets import AccessSets
from .clocks import Clock, join
from .layout import PENDING, SHIFT, as_bytes, take


class _Shadow:
    """Records of the granules of one region."""

    def __init__(self, granules: int) -> None:
        self.stored_by = np.zeros(granules, np.int32)  # the last plain store: warp + 1
        self.stored_at = np.zeros(granules, np.int32)
        self.readers = np.zeros(granules, np.int32)  # sets of accesses
        self.strong: np.ndarray | None = None  # sets of strong writes
        self.has_clock: np.ndarray | None = None  # whether something was released there


class GlobalOrder:
    """Who is ordered before whom in one launch. `inside`: also between the warps of one CTA."""

    def __init__(self, granule: int, inside: bool = False) -> None:
        self._shift = SHIFT[granule]
        self.inside = inside
        self._sets = AccessSets()
        self._clocks: dict[int, Clock] = {}  # address → what was released there

    def released(self, batch, bw):
        """All that warp `bw` of the batch may pass on now."""
        cta, warp = divmod(bw, batch.warps)
        shared = batch.shared
        row = shared.seen[cta, warp, : batch.warps].copy()
        row[warp] = shared.now
        far = shared.far.get(bw)
        times = dict(far.times) if far is not None else {}
        times[batch.cta_numbers[cta]] = row
        return Clock(times)

    def acquire(self, batch, bw, clock):
        """Let warp `bw` of the batch know what `clock` knows."""
        if clock is None:
            return
        cta, warp = divmod(bw, batch.warps)
        shared = batch.shared
        own = clock.times.get(batch.cta_numbers[cta])
        if own is not None:
            row = shared.seen[cta, warp, : batch.warps]
            own = np.maximum(row, own)
            own[warp] = row[warp]
            row[:] = own
        shared.far[bw] = join(shared.far.get(bw), clock)

    def fence(self, batch, bws):
        """fence.acq_rel of gpu or wider scope by these warps of the batch."""
        for bw in map(int, bws):
            self.acquire(batch, bw, batch.observed.pop(bw, None))
            batch.released[bw] = self.released(batch, bw)
        batch.shared.now += 1

    def synchronise(self, batch, addr, lanes, kind, sem, wrote=None):
        """Effects of strong accesses on clocks, in the order of lanes.

        kind: "load", "store" or "rmw"; sem: "acquire", "release"; wrote: which lanes of a
        read-modify-write changed memory (None: all).
        """
        clocks = self._clocks
        if kind == "load" and not clocks:
            return
        bws = take(batch.lane_bw, lanes)
        released: dict[int, Clock] = {}
        met: dict[int, Clock | None] = {}
        joined: dict[tuple[int, ...], Clock | None] = {}
        for k in range(addr.shape[0]):
            a, bw = int(addr[k]), int(bws[k])
            there = clocks.get(a)
            if kind != "store" and there is not None and (bw, id(there)) not in joined:
                joined[bw, id(there)] = there
                met[bw] = join(met.get(bw), there)
            if kind == "load" or (wrote is not None and not wrote[k]):
                continue
            if "release" not in sem:
                mine = batch.released.get(bw)
            elif bw in released:
                mine = released[bw]
            else:
                mine = released[bw] = self.released(batch, bw)
            if kind == "store":
                if mine is None:
                    clocks.pop(a, None)
                else:
                    clocks[a] = mine
            elif mine is not None:
                # A read-modify-write continues what was released there before.
                key = (id(there), id(mine), 0)
                if key not in joined:
                    joined[key] = join(there, mine)
                    joined[(*key, 1)], joined[(*key, 2)] = there, mine  # keeps the ids alive
                clocks[a] = joined[key]
        for bw, clock in met.items():
            if "acquire" in sem:
                self.acquire(batch, bw, clock)
            else:
                batch.observed[bw] = join(batch.observed.get(bw), clock)
        if released:
            batch.shared.now += 1

    def known(self, batch, bw, warp):
        """Time up to which `warp` of the launch is ordered before warp `bw` of the batch."""
        cta, w = divmod(warp, batch.warps)
        c = bw // batch.warps
        if cta == batch.cta_numbers[c]:
            return int(batch.shared.seen[c, bw % batch.warps, w])
        far = batch.shared.far.get(bw)
        times = far.times.get(cta) if far is not None else None
        return 0 if times is None else int(times[w])

    def access(self, batch, region, idx, size, lanes, strong, new=None):
        """Check accesses before they happen and record them; `new`: the values of a write."""
        shadow = region.shadow
        if shadow is None:
            shadow = region.shadow = _Shadow(region.span >> self._shift)
        g = self._granules(idx, size)
        change = None
        if new is not None:
            shape = idx.size, g.shape[1], -1
            change = (as_bytes(region.views[size][idx], *shape) != as_bytes(new, *shape)).any(2)
        self._check_stores(batch, region, shadow, g, lanes, change, strong)
        if new is not None:
            self._check_sets(batch, region, shadow.readers, g, lanes, change, strong, "loaded")
        if not strong and shadow.strong is not None:
            verb = "changed atomically"
            self._check_sets(batch, region, shadow.strong, g, lanes, change, strong, verb)
        self._record(batch, region, shadow, g, lanes, change, strong)
        return g

    def _granules(self, idx, size):
        shift = SHIFT[size] - self._shift
        if shift >= 0:
            return (idx << shift)[:, None] + np.arange(1 << shift)
        return (idx >> -shift)[:, None]

    def _check_stores(self, batch, region, shadow, g, lanes, change, strong):
        """Earlier plain stores."""
        stored = shadow.stored_by[g]
        if not stored.any():
            return
        other, us = stored - 1, take(batch.lane_warp_number, lanes)[:, None]
        if not self.inside:
            far = (stored != 0) & (other // batch.warps != us // batch.warps)
        else:
            far = (stored != 0) & (other != us)
        if change is not None:
            far &= change
        if not far.any():
            return
        r, c = np.nonzero(far)
        bws = take(batch.lane_bw, lanes)
        other, at, bw = other[r, c].astype(np.int64), shadow.stored_at[g[r, c]], bws[r]
        pairs, inverse = np.unique(bw.astype(np.int64) * (1 << 32) + other, return_inverse=True)
        known = [self.known(batch, int(p >> 32), int(p & 0xFFFFFFFF)) for p in pairs]
        bad = np.flatnonzero(at > np.array(known, np.int64)[inverse])
        if bad.size:
            i = int(bad[0])
            place = int(r[i]), int(g[r[i], c[i]])
            self._race(batch, region, lanes, place, int(other[i]), "stored", change, strong)

    def _check_sets(self, batch, region, table, g, lanes, change, strong, verb):
        """Earlier plain loads, or strong writes."""
        node = table[g]
        hit = node != 0
        if change is not None:
            hit &= change
        if not hit.any():
            return
        r, c = np.nonzero(hit)
        pair = node[r, c].astype(np.int64) * (1 << 32) + take(batch.lane_bw, lanes)[r]
        for p, i in zip(*np.unique(pair, return_index=True), strict=True):
            warp = self._unordered(batch, int(p) >> 32, int(p) & 0xFFFFFFFF)
            if warp is not None:
                place = int(r[i]), int(g[r[i], c[i]])
                self._race(batch, region, lanes, place, warp, verb, change, strong)

    def _unordered(self, batch, node, bw):
        """A warp of the set that is not ordered before warp `bw` of the batch, or None."""
        cta = batch.cta_numbers[bw // batch.warps]
        me = cta * batch.warps + bw % batch.warps
        for warps, at in self._sets.chain(node):
            for warp in map(int, warps if self.inside else warps[warps // batch.warps != cta]):
                if warp != me and at > self.known(batch, bw, warp):
                    return warp
        return None

    def _record(self, batch, region, shadow, g, lanes, change, strong):
        us, now = take(batch.lane_warp_number, lanes), batch.shared.now
        if change is None:
            if not strong:
                self._sets.add(shadow.readers, g, us, now)
        elif not strong:
            shadow.stored_by[g] = us[:, None] + 1
            shadow.stored_at[g] = now
            shadow.readers[g] = 0
            if shadow.has_clock is not None and shadow.has_clock[g].any():
                self._forget_clocks(region, shadow, np.unique(g[shadow.has_clock[g]]))
        else:
            if shadow.strong is None:
                shadow.strong = np.zeros(shadow.stored_by.size, np.int32)
                shadow.has_clock = np.zeros(shadow.stored_by.size, bool)
            if change.any():
                rows = change.any(1)
                self._sets.add(shadow.strong, g[rows], us[rows], now)
            shadow.has_clock[g] = True

    def _forget_clocks(self, region, shadow, granules):
        """A plain store ends what was released at an address."""
        for i in map(int, granules):
            start = region.view_base + (i << self._shift)
            for addr in range(start, start + (1 << self._shift)):
                self._clocks.pop(addr, None)
            shadow.has_clock[i] = False

    def pending(self, region, idx, size):
        """Mark stores just recorded as not performed; (times, granules) to set when they are."""
        stored_at, g = region.shadow.stored_at, np.unique(self._granules(idx, size))
        stored_at[g] = PENDING
        return stored_at, g

    def after_store(self, batch, region, g, size, lanes, new):
        """Warps that stored different values to one granule with the same instruction."""
        us = take(batch.lane_warp_number, lanes)[:, None]
        stored = region.shadow.stored_by[g]
        bad = stored != us + 1
        if not bad.any() or size < 1 << self._shift:
            return
        if not self.inside:
            bad &= (stored - 1) // batch.warps != us // batch.warps
        cell = region.views[1].reshape(-1, 1 << self._shift)[g]
        bad &= (cell != as_bytes(new, *cell.shape)).any(2)
        if bad.any():
            r, c = np.argwhere(bad)[0]
            place, other = (int(r), int(g[r, c])), int(stored[r, c]) - 1
            self._race(batch, region, lanes, place, other, "stored", bad, False)

    def _race(self, batch, region, lanes, place, warp, verb, change, strong):
        """Access place[0] touches granule place[1] that `warp` of the launch has touched."""
        act = "load" if change is None else "atomic" if strong else "store"
        cta, w = batch.cta_name(warp // batch.warps), warp % batch.warps
        raise GlobalRace(
            f"{act} touches bytes of {region.name} that warp {w} of CTA {cta} {verb}; "
            "no barrier or release/acquire pair orders the two",
            *batch.who(place[0], lanes),
            region.view_base + (place[1] << self._shift),
        )
