"""Runs all CTAs of a launch: in which order they start, and which of them go on next."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np

from ..errors import Deadlock
from .batch import Batch
from .state import Launch

_SLICES = (1, 2, 5, 20, 100, 500, 3000)  # blocks, of random schedules


class _Grid:
    """CTAs of a launch that have not started, and batches under way."""

    def __init__(self, launch: Launch) -> None:
        self.launch, self.opts = launch, launch.opts
        self.mode, _, seed = self.opts.schedule.partition(":")
        self.random = random.Random(int(seed)) if self.mode == "random" else None
        self.waiting = launch.ctas
        self.order = self._start_order()
        self.live: list[Batch] = []  # the next to run first
        # The version of global memory at which the last batch gave way without changing it.
        self.yielded: int | None = None
        self.version = -1
        self.changed_at = 0  # blocks run when global memory was last seen to change

    def _start_order(self) -> Iterator[int]:
        numbers = range(self.waiting)
        if self.mode == "reverse":
            return iter(reversed(numbers))
        if self.random is not None:
            shuffled = list(numbers)
            self.random.shuffle(shuffled)
            return iter(shuffled)
        return iter(numbers)

    def batch_size(self) -> int:
        """CTAs that run in lock step: a vector of threads, and not too large a shadow."""
        if self.mode != "lockstep":
            return 1
        program, warps = self.launch.program, self.launch.threads // 32
        bytes_ = max(1, program.shared_size)
        if self.opts.check_shared:
            bytes_ *= 1 + (9 + 4 * (warps + 3)) / program.granule
        most = min(self.opts.batch_lanes // self.launch.threads, int(192e6 // bytes_))
        return max(1, min(most, self.launch.ctas))

    def room(self) -> int:
        """CTAs that may start now."""
        if self.opts.resident is None:
            return self.waiting
        resident = sum(batch.unfinished() for batch in self.live)
        return min(self.waiting, self.opts.resident - resident)

    def run(self) -> None:
        size = self.batch_size()
        while self.live or self.waiting:
            room = self.room()
            batch = self._next(size, room)
            before = self.launch.global_memory.version
            slice_ = self.random.choice(_SLICES) if self.random else self.opts.slice_blocks
            finished = batch.run(slice_)
            self._after(batch, before, finished)
            self._check_progress(finished, room)

    def _next(self, size: int, room: int) -> Batch:
        """Start a batch, or go on with one that is not blocked. Deadlock."""
        version = self.launch.global_memory.version
        ready = [b for b in self.live if not b.blocked or b.blocked_version != version]
        starts = self._prefers_start(len(ready)) or not ready
        if room > 0 and starts:
            numbers = list(itertools.islice(self.order, min(size, room)))
            self.waiting -= len(numbers)
            return Batch(self.launch, numbers)
        if not ready:
            raise self._deadlock("no thread makes progress")
        batch = self.random.choice(ready) if self.random else ready[0]
        self.live.remove(batch)
        return batch

    def _prefers_start(self, ready: int) -> bool:
        few = len(self.live) < self.opts.max_live
        if self.mode == "lockstep":
            return few
        if self.random is not None:
            return few and self.random.randrange(ready + 1) == 0
        return few and self.yielded == self.launch.global_memory.version

    def _after(self, batch: Batch, before: int, finished: bool) -> None:
        version, counts = self.launch.global_memory.version, self.launch.counts
        if finished:
            counts.shared_read += batch.shared.nread
            counts.shared_written += batch.shared.nwritten
            self.yielded = None
            return
        self.yielded = version if version == before else None
        if self.mode in ("sequential", "reverse") and self.yielded is None:
            self.live.insert(0, batch)
        else:
            self.live.append(batch)

    def _check_progress(self, finished: bool, room: int) -> None:
        version, steps = self.launch.global_memory.version, self.launch.counts.steps
        if finished or version != self.version:
            self.version, self.changed_at = version, steps
        elif steps - self.changed_at > self.opts.max_blocks and room <= 0:
            blocks = steps - self.changed_at
            raise self._deadlock(
                f"gave up after {blocks} basic blocks without a change in global memory"
            )

    def _deadlock(self, why: str) -> Deadlock:
        batch = self.live[0]
        text = f"{why}: {batch.describe_wait()}"
        if self.waiting:
            text += f"; {self.waiting} CTAs cannot start, {self.opts.resident} are resident"
        lane = int(np.flatnonzero(batch.alive)[0])
        error = Deadlock(text, batch.ctas[lane // batch.threads])
        error.kernel = self.launch.program.name
        return error


def run_grid(launch: Launch) -> None:
    """Run all CTAs of a launch. PTXError."""
    with np.errstate(all="ignore"):
        _Grid(launch).run()
