"""mbarrier: init, inval, arrive, expect_tx, try_wait.

What is asynchronous arrives as late as it may: bulk copies and products land when somebody waits,
and the first attempt of every warp after that returns false. Code that does not retry is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import PTXError, Unsupported
from ..memory.clocks import Clock, join
from ..memory.layout import take
from ..numbers.integers import U32
from . import tensor_products
from .addressing import addresser, merge, of_thread, per_thread, select


@dataclass
class MBarrier:
    """One barrier: arrivals and bytes that its phase waits for, and what waiting for it teaches."""

    count: int
    clock_size: int
    pending: int = 0
    tx: int = 0
    phase: int = 0
    phases: int = 0  # completed
    late: bool = False  # the last of them was completed by something asynchronous
    refused: dict[int, int] = field(default_factory=dict)  # warp → phase it was refused once
    copies: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # bulk loads
    commits: list[tensor_products.Commit] = field(default_factory=list)
    far: Clock | None = None
    done_far: Clock | None = None

    def __post_init__(self) -> None:
        self.pending = self.count
        self.clock = np.zeros(self.clock_size, np.int64)
        self.done_clock = np.zeros(self.clock_size, np.int64)

    def complete(self) -> bool:
        """Begin the next phase if nothing is outstanding; whether it did."""
        if self.pending or self.tx:
            return False
        self.phase ^= 1
        self.phases += 1
        self.late = False
        self.pending = self.count
        self.done_clock, self.done_far = self.clock.copy(), self.far
        return True

    def arrive(self, count: int, where: tuple[Any, ...] = ()) -> None:
        """Count arrivals. PTXError."""
        if count > self.pending:
            raise PTXError("more arrivals on an mbarrier than it expects", *where)
        self.pending -= count


def mbarrier(em, ins):
    """Any of them but those with state tokens."""
    kind, args = ins.mods[0], ins.args
    if kind == "arrive" and args[0][0] == "_":
        args = args[1:]
    token = (kind == "arrive" and args[0][0] != "m") or (
        kind in ("try_wait", "test_wait") and "parity" not in ins.mods
    )
    if token:
        raise Unsupported("mbarrier state token")
    if kind == "init":
        return _init(em, args)
    if kind == "inval":
        return _inval(em, args)
    if kind in ("arrive", "expect_tx") and not ins.has("noComplete", "shared::cluster"):
        return _arrive(em, ins, args)
    if kind in ("try_wait", "test_wait"):
        return _try_wait(em, args)
    raise Unsupported(ins.full)


def _addressed(em, op, *, init=False):
    """Function (batch, r, q) → [(place in the batch's shared memory, lanes)] of every barrier."""
    address = addresser(em, op, wide=False)

    def find(batch, r, q) -> list[tuple[int, list[int]]]:
        lanes = select(batch, q)
        if lanes is not None and lanes.size == 0:
            return []
        shared = batch.shared
        addr = take(address(batch, r), lanes).astype(U32)
        idx = shared.index(batch, addr, 8, lanes, "mbarrier")
        if shared.check and not init:
            g = shared.granules_of(idx, 8)
            rows = take(batch.lane_row, lanes)
            late = shared.written_at[g] > shared.seen_flat[rows[:, None] + shared.written_by[g]]
            if late.any():
                shared.fail(batch, late, g, lanes, lambda i: _not_ready(shared, i))
        found: dict[int, list[int]] = {}
        for k, place in enumerate(map(int, idx)):
            found.setdefault(place, []).append(k if lanes is None else int(lanes[k]))
        return list(found.items())

    return find


def _not_ready(shared, granule):
    by = shared.agent_name(shared.written_by[granule])
    return f"mbarrier used with no barrier after {by} initialised it"


def _init(em, args):
    find = _addressed(em, args[0], init=True)

    def run(batch, r, q):
        shared = batch.shared
        for place, lanes in find(batch, r, q):
            batch.mbarriers[place] = MBarrier(of_thread(args[1], r, lanes[0]), shared.clock_size)
            if shared.check:
                g = shared.granules_of(np.array([place]), 8)
                shared.written_at[g] = shared.now
                shared.written_by[g] = batch.lane_warp[lanes[0]]

    return run


def _inval(em, args):
    find = _addressed(em, args[0])

    def run(batch, r, q):
        for place, _ in find(batch, r, q):
            barrier = batch.mbarriers.pop(place, None)
            if barrier is None:
                raise PTXError("mbarrier.inval on something that is no mbarrier")
            if barrier.copies:
                raise PTXError("mbarrier.inval while copies that signal it are in flight")
            tensor_products.abandon(batch, barrier.commits, place)

    return run


def _arrive(em, ins, args):
    find = _addressed(em, args[0])
    amount = args[1] if len(args) > 1 else ("i", 1)
    arrives, expects = ins.mods[0] == "arrive", "expect_tx" in ins.mods

    def run(batch, r, q):
        shared = batch.shared
        found = find(batch, r, q)
        for place, lanes in found:
            barrier = batch.mbarrier(place, lanes[0])
            for lane in lanes:
                value = of_thread(amount, r, lane)
                if expects:
                    barrier.tx += value
                if arrives:
                    barrier.arrive(1 if expects else value, batch.who(lane))
            if shared.clocks:
                for cta, warp in _warps(batch, lanes):
                    barrier.far = join(barrier.far, shared.far.get(cta * batch.warps + warp))
                    barrier.clock = np.maximum(barrier.clock, shared.known_to(cta, warp))
            batch.progress |= barrier.complete()
        shared.now += bool(found)

    return run


def _warps(batch, lanes) -> Iterator[tuple[int, int]]:
    """(CTA, warp) of these lanes of one CTA."""
    for bw in {int(lane) // 32 for lane in lanes}:
        yield divmod(bw, batch.warps)


def _try_wait(em, args):
    result, address, parity_of = args[:3]
    find = _addressed(em, address)
    parity = per_thread(parity_of)

    def run(batch, r, q):
        found = find(batch, r, q)
        if not found:
            return
        done = np.zeros(batch.lanes, bool)
        wanted = np.broadcast_to(parity(r), batch.lanes)
        for place, lanes in found:
            barrier = batch.mbarrier(place, lanes[0])
            some = np.array(lanes)
            passed = _attempt(batch, barrier, some, wanted[some] & 1)
            _land(batch, barrier)
            done[some] = passed
            if batch.shared.clocks:
                for cta, warp in _warps(batch, some[passed]):
                    _learn(batch, barrier, cta, warp)
        if (done if q is None else done | ~q).all():
            batch.progress = True
        else:
            batch.spinning = True
        merge(r, result[1], done, q)

    return run


def _attempt(batch, barrier, lanes, parity):
    """Which lanes see the phase of this parity complete; not a warp's first attempt."""
    passed = parity != barrier.phase
    for warp in np.unique(lanes // 32):
        mine = lanes // 32 == warp
        if not passed[mine].any():
            barrier.refused[int(warp)] = barrier.phases + 1
        elif barrier.late and barrier.refused.get(int(warp)) != barrier.phases:
            passed &= ~mine
            barrier.refused[int(warp)] = barrier.phases
            batch.progress = True
    return passed


def _learn(batch, barrier, cta, warp):
    shared = batch.shared
    if barrier.done_far is not None:
        bw = cta * batch.warps + warp
        shared.far[bw] = join(shared.far.get(bw), barrier.done_far)
    shared.learn(cta, warp, barrier.done_clock)


def _land(batch, barrier):
    """Land all bulk copies that signal a barrier, and finish products committed to it."""
    for _ in tensor_products.arrivals(batch, barrier):
        batch.progress |= barrier.complete()
        barrier.late = True
    if not barrier.copies:
        return
    shared = batch.shared
    for idx, data in barrier.copies:
        shared.views[16][idx >> 4] = data
        shared.nwritten += 16 * idx.size
        barrier.tx -= 16 * idx.size
        if shared.check:
            g = shared.granules_of(idx, 16)
            shared.written_at[g] = shared.now
            shared.written_by[g] = shared.copy_agent
    barrier.copies = []
    barrier.clock[shared.copy_agent] = shared.now
    shared.now += 1
    if barrier.complete():
        barrier.late = batch.progress = True
