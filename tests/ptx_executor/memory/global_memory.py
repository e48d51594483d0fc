"""Global memory: the real memory of the CPU tensors, reachable through registered regions alone."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import Misaligned, OutOfBounds
from .global_order import GlobalOrder
from .layout import CHUNK, SHIFT, take, views_of

_ONES = {size: np.frombuffer(b"\1" * 16, dtype)[0] for size, dtype in CHUNK.items()}


class Region:
    """A stretch of host memory that kernels may access."""

    def __init__(self, base: int, size: int, name: str, keep: Any = None, writable: bool = True):
        self.base, self.size, self.end = base, size, base + size
        self.name, self.keep, self.writable = name, keep, writable
        # The views begin and end at multiples of 16 bytes. What they have more than the region may
        # be somebody else's memory, which the check of every access keeps kernels off.
        self.view_base = base & ~15
        self.span = (((self.end + 15) & ~15) - self.view_base) if size else 0
        if self.span:
            buffer: Any = (ctypes.c_uint8 * self.span).from_address(self.view_base)
        else:
            buffer = bytearray(0)
        self.views = views_of(np.frombuffer(buffer, dtype=np.uint8))
        self._touched: dict[str, dict[int, np.ndarray]] = {}
        self.shadow: Any = None  # GlobalOrder's records

    def mark(self, kind: str, size: int, idx: np.ndarray) -> None:
        """Note that these units of `size` bytes were accessed: "r" or "w"."""
        if kind not in self._touched:
            self._touched[kind] = views_of(np.zeros(self.span, np.uint8))
        self._touched[kind][size][idx] = _ONES[size]

    def unique(self, kind: str) -> int:
        """The number of distinct bytes accessed."""
        views = self._touched.get(kind)
        return int(np.count_nonzero(views[1])) if views else 0


class GlobalMemory:
    """The regions of one launch, what was accessed of them, and whether it was ordered.

    `track_unique`: count distinct bytes; `race`: check the order of accesses by CTAs, or "warps";
    `granule`: bytes of the smallest access, which the records of the order have as their unit.
    """

    def __init__(self, track_unique: bool = True, race: bool | str = False, granule: int = 1):
        self.regions: list[Region] = []
        self._starts: list[int] = []
        self.track = track_unique
        self.order = GlobalOrder(granule, race == "warps") if race else None
        self.version = 0  # changes when memory may have changed
        self.nread = self.nwritten = self.natomic = 0  # bytes

    def add(self, base: int, size: int, name: str, keep: Any = None, writable: bool = True) -> None:
        """Register `size` bytes at `base`; regions that overlap become one."""
        if size <= 0:
            return
        low, high = base, base + size
        names, kept, others = [name], [keep], []
        for region in self.regions:
            if region.base < high and low < region.end:
                low, high = min(low, region.base), max(high, region.end)
                names.append(region.name)
                kept.append(region.keep)
                writable = writable or region.writable
            else:
                others.append(region)
        merged = Region(low, high - low, "+".join(dict.fromkeys(names)), kept, writable)
        self.regions = sorted([*others, merged], key=lambda region: region.base)
        self._starts = [region.base for region in self.regions]

    def find(self, addr: int) -> Region | None:
        """The region of an address."""
        i = bisect.bisect_right(self._starts, addr) - 1
        return self.regions[i] if i >= 0 and addr < self.regions[i].end else None

    def locate(self, batch, addr, size, lanes, what):
        """[(region, accesses or None for all, their units in it)]. OutOfBounds, Misaligned."""
        region = self.find(int(addr[0]))
        if region is not None and size <= region.size:
            offset = addr - np.uint64(region.base)
            if not (offset > np.uint64(region.size - size)).any():
                return [(region, None, _units(batch, region, addr, size, lanes, what))]
        parts = []
        left = np.ones(addr.shape[0], bool)
        for region in self.regions:
            if region.size < size:
                continue
            inside = left & ((addr - np.uint64(region.base)) <= np.uint64(region.size - size))
            if inside.any():
                some = np.flatnonzero(inside)
                units = _units(batch, region, addr[some], size, _compose(lanes, some), what)
                parts.append((region, some, units))
                left &= ~inside
        if left.any():
            k = int(np.flatnonzero(left)[0])
            raise OutOfBounds(
                f"global {what} of {size} bytes out of bounds "
                f"({self._nearest(int(addr[k]))}; {int(left.sum())} threads)",
                *batch.who(k, lanes),
                int(addr[k]),
            )
        return parts

    def _nearest(self, addr: int) -> str:
        def distance(region: Region) -> int:
            return region.base - addr if addr < region.base else addr - region.end

        if not self.regions:
            return "no memory is registered"
        region = min(self.regions, key=distance)
        side = "before the start" if addr < region.base else "past the end"
        return f"{distance(region)} bytes {side} of {region.name}, {region.size} bytes"

    def load(self, batch, addr, size, lanes, what="load", sem=None):
        """The value of every access; `sem`: None for a plain one, or what `semantics` says."""
        parts = self.locate(batch, addr, size, lanes, what)
        self.nread += size * addr.shape[0]
        order = self.order
        if order is not None and sem is not None:
            order.synchronise(batch, addr, lanes, "load", sem)
        out = np.empty(addr.shape[0], CHUNK[size]) if parts[0][1] is not None else None
        for region, some, idx in parts:
            if self.track:
                region.mark("r", size, idx)
            if order is not None:
                order.access(batch, region, idx, size, _compose(lanes, some), sem is not None)
            if out is None:
                return region.views[size][idx]
            out[some] = region.views[size][idx]
        return out

    def store(self, batch, addr, size, values, lanes, what="store", sem=None):
        """Put every access's value."""
        self.nwritten += size * addr.shape[0]
        self.version += 1
        order = self.order
        for region, some, idx in self.locate(batch, addr, size, lanes, what):
            mine, new = _compose(lanes, some), take(values, some)
            if not region.writable:
                message = f"store to read-only {region.name}"
                raise OutOfBounds(message, *batch.who(0, mine), int(addr[0]))
            if self.track:
                region.mark("w", size, idx)
            if order is not None:
                granules = order.access(batch, region, idx, size, mine, sem is not None, new)
            region.views[size][idx] = new
            if order is not None and sem is None:
                order.after_store(batch, region, granules, size, mine, new)
        if order is not None and sem is not None:
            order.synchronise(batch, addr, lanes, "store", sem)

    def atomic(self, batch, addr, size, lanes, function, operands, sem=frozenset()):
        """Read, modify, write: the new value is function(old, *operands); returns the old values.

        Accesses to one address come one after the other.
        """
        parts = self.locate(batch, addr, size, lanes, "atomic")
        self.natomic += size * addr.shape[0]
        out = np.empty(addr.shape[0], CHUNK[size])
        order = self.order
        for region, some, idx in parts:
            if self.track:
                region.mark("r", size, idx)
                region.mark("w", size, idx)
            view = region.views[size]
            before = view[idx]
            place = np.arange(addr.shape[0]) if some is None else some
            one_by_one(view, idx, place, function, operands, out)
            after = view[idx]
            if (before.view(np.uint8) != after.view(np.uint8)).any():
                self.version += 1
            if order is not None:
                view[idx] = before
                order.access(batch, region, idx, size, _compose(lanes, some), True, after)
                view[idx] = after
        if order is not None:
            # A compare-and-swap that fails has written nothing, so it releases nothing.
            always = "release" in sem and len(operands) != 2
            new = np.ascontiguousarray(function(out, *operands)).view(out.dtype)
            order.synchronise(batch, addr, lanes, "rmw", sem, None if always else new != out)
        return out

    def cstring(self, addr: int, limit: int = 4096) -> str:
        """The text at an address."""
        region = self.find(addr)
        if region is None:
            return f"<{addr:#x}>"
        start, end = addr - region.view_base, region.end - region.view_base
        raw = bytes(region.views[1][start : min(start + limit, end)])
        return raw.split(b"\0", 1)[0].decode(errors="replace")


def _compose(lanes: np.ndarray | None, some: np.ndarray | None) -> np.ndarray | None:
    """The lanes of some of the accesses."""
    if some is None:
        return lanes
    return some if lanes is None else lanes[some]


def _units(batch, region, addr, size, lanes, what):
    misaligned = addr & np.uint64(size - 1)
    if misaligned.any():
        k = int(np.flatnonzero(misaligned)[0])
        message = f"misaligned global {what} of {size} bytes"
        raise Misaligned(message, *batch.who(k, lanes), int(addr[k]))
    return ((addr - np.uint64(region.view_base)) >> np.uint64(SHIFT[size])).astype(np.int64)


def one_by_one(
    view: np.ndarray,
    idx: np.ndarray,
    place: np.ndarray,
    function: Callable[..., np.ndarray],
    operands: list[np.ndarray],
    out: np.ndarray,
) -> None:
    """Apply a read-modify-write to units of `view`, those of one unit in their order.

    `place`: where each finds its operands and leaves the old value in `out`.
    """
    while place.size:
        _, first = np.unique(idx, return_index=True)
        last_round = first.size == idx.size
        now = slice(None) if last_round else np.sort(first)
        unit, at = idx[now], place[now]
        old = view[unit]
        out[at] = old
        view[unit] = function(old, *(operand[at] for operand in operands))
        if last_round:
            return
        later = np.ones(idx.size, bool)
        later[now] = False
        idx, place = idx[later], place[later]
