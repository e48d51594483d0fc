"""Runs the blocks of a program for a batch of CTAs.

All CTAs of a batch run in lock step as one wide vector of threads. Threads that part at a branch
form groups, one for each block; the group with the smallest block runs next and groups that reach
the same block merge. A group that spins (a failed mbarrier wait, or a state that comes back) gives
way, so waiting loops go on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import Deadlock, PTXError
from ..handlers import tensor_products
from ..ptx.instructions import Instruction
from ..translation.blocks import Block
from .barriers import Barriers, Groups, Mask
from .snapshots import Snapshot
from .state import Launch, State

_TURNS = 4096  # for which one of several groups that can run comes first


class Batch(State):
    """CTAs that run in lock step, by their numbers."""

    def __init__(self, launch: Launch, numbers: list[int]) -> None:
        super().__init__(launch, numbers)
        self.barriers = Barriers(self)
        self.groups: dict[int, Mask] = {0: None}  # block → threads that are about to run it
        self._idle: set[int] = set()  # groups that spun without success
        self._idle_version = 0  # of global memory when the first of them gave way
        self.blocked = False  # every group waits for something outside the batch
        self.blocked_version = 0
        self._turn = 0
        # An earlier state, to notice that the batch runs in circles.
        self._snapshot: Snapshot | None = None
        self._until_snapshot = self.snapshot_gap = 256

    def unfinished(self) -> int:
        """The number of CTAs that still run."""
        return int(self.alive.reshape(len(self.ctas), -1).any(1).sum())

    def run(self, budget: int) -> bool:
        """Run up to about `budget` blocks; True when every thread has exited."""
        if self.blocked:
            self.blocked = False
            self._idle.clear()
        steps = 0
        while self.groups and steps <= budget:
            block = self._choose()
            if block is None:
                break
            steps += self._run_group(block, self.groups.pop(block), budget - steps)
        self.launch.counts.steps += steps
        if self.groups:
            return False
        self._check_end()
        return True

    def _choose(self) -> int | None:
        """The block of the group that runs next; None if none can."""
        runnable = [block for block in self.groups if block not in self._idle]
        if not runnable:
            version = self.global_memory.version
            if not self.progress and self._idle_version == version:
                self.blocked, self.blocked_version = True, version
                return None
            self.progress = False
            self._idle.clear()
            runnable = list(self.groups)
        if len(runnable) == 1:
            return runnable[0]
        self._turn += 1
        return sorted(runnable)[(self._turn - 1) // _TURNS % len(runnable)]

    def _run_group(self, number: int, m: Mask, budget: int) -> int:
        """Run a group while it stays the only one; how many blocks it has run."""
        for steps in itertools.count(1):
            if self._is_circling(number, m):
                return steps - 1
            block = self.program.blocks[number]
            self._execute(block, m)
            following = self._after(block, m)
            if self.spinning:
                self.spinning = False
                self._rest_from_now()
                for number, m in following:
                    self._add(number, m)
                    self._idle.add(number)
                return steps
            if len(following) > 1 or not following or self.groups or steps > budget:
                for number, m in following:
                    self._add(number, m)
                return steps
            number, m = following[0]
        raise AssertionError

    def _execute(self, block: Block, m: Mask) -> None:
        program = self.program
        if m is None:
            function = block.full or program.function(block, masked=False)
            warps = self.lanes // 32
        else:
            function = block.masked or program.function(block, masked=True)
            warps = int(m.reshape(-1, 32).any(1).sum())
        self.launch.counts.blocks[block.index] += warps
        try:
            function(self, self.regs, m)
        except PTXError as error:
            error.at(program.name, _instruction_of(error, function))
            raise
        except Exception as error:
            ins = _instruction_of(error, function)
            if ins is None or "PTX not executed" in str(error):
                raise
            where = f"`{ins.text}` [{ins.where()}] of kernel {program.name}"
            if isinstance(error, NotImplementedError):
                raise NotImplementedError(f"PTX not executed: {where}: {error}") from error
            reason = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"executor failed at {where}: {reason}") from error

    def _rest_from_now(self) -> None:
        """A group is about to become idle: what is global memory like?"""
        if not self._idle:
            self._idle_version = self.global_memory.version

    def _is_circling(self, number: int, m: Mask) -> bool:
        """Whether this state was met before: then the threads that ran since wait for others."""
        snapshot = self._snapshot
        if snapshot is None:
            self._until_snapshot -= 1
            if self._until_snapshot <= 0:
                self._snapshot = Snapshot(self, number, m)
            return False
        changed = snapshot.version != self.global_memory.version
        if changed or snapshot.left <= 0:
            self._snapshot = None
            self.snapshot_gap = min(2 * self.snapshot_gap, 4096)
            self._until_snapshot = self.snapshot_gap if changed else 0
            return False
        snapshot.left -= 1
        if not snapshot.equals(self, number, m):
            snapshot.note(m)
            return False
        self._snapshot = None
        self._until_snapshot = self.snapshot_gap
        self._rest_from_now()
        self.progress = snapshot.progress
        self._idle.update(block for block, mask in self.groups.items() if snapshot.has_run(mask))
        self._add(number, m)
        self._idle.add(number)
        return True

    def _add(self, number: int, m: Mask) -> None:
        """Threads come to a block."""
        if number not in self.groups:
            self.groups[number] = m
            return
        self._idle.discard(number)
        m = self.groups[number] | m
        self.groups[number] = None if not self.exited and m.all() else m

    def _after(self, block: Block, m: Mask) -> Groups:
        """Where threads go after a block."""
        if block.kind == "fall":
            return [(block.next, m)]
        q: Mask = None
        if block.last is not None and block.last.pred is not None:
            register, negated = block.last.pred
            predicate = ~self.regs[register] if negated else self.regs[register]
            q = predicate if m is None else predicate & m
        if block.kind == "branch":
            if q is None:
                return [(block.targets[0], m)]
            return _part(q, m, block.targets[0], block.next)
        if block.kind == "table":
            return self._by_table(block, m, q)
        if block.kind == "return":
            return self._return(block, m, q)
        return self.barriers.reach(block, m, q)

    def _by_table(self, block: Block, m: Mask, q: Mask) -> Groups:
        acting = m if q is None else q
        assert block.last
        index = self.regs[block.last.args[0][1]]
        groups: Groups = []
        for value in np.unique(index if acting is None else index[acting]):
            if value >= len(block.targets):
                size = len(block.targets)
                error = PTXError(f"brx index {value} outside the table of {size}")
                raise error.at(self.program.name, block.last)
            mask = index == value if acting is None else (index == value) & acting
            whole = acting is None and mask.all()
            groups.append((block.targets[int(value)], None if whole else mask))
        return groups + _others(q, m, block.next)

    def _return(self, block: Block, m: Mask, q: Mask) -> Groups:
        gone = m if q is None else q
        if gone is None:
            self.alive[:] = False
            self.exited = True
            return []
        staying = _others(q, m, block.next)
        if not gone.any():
            return staying
        self.alive &= ~gone
        self.exited = True
        return staying + self.barriers.release_all()

    def _check_end(self) -> None:
        """What threads that have all exited should have waited for."""
        name = self.program.name
        if self.barriers.waiting:
            raise Deadlock(f"threads wait for ever: {self.describe_wait()}").at(name)
        if self.bulk_pending:
            raise PTXError(
                "CTA ended while a bulk store may still read its shared memory (no wait_group)",
                *self.who(self.bulk_pending[0][0]),
            ).at(name)
        error = tensor_products.leftovers(self)
        if error is not None:
            raise error.at(name)

    def describe_wait(self) -> str:
        """Which threads wait where."""
        parts = []
        for number, m in itertools.islice(self.groups.items(), 4):
            block = self.program.blocks[number]
            ins = block.instructions[0] if block.instructions else block.last
            where = f"`{ins.text}` [{ins.where()}]" if ins else "`end`"
            parts.append(f"{self.lanes if m is None else int(m.sum())} threads spin at {where}")
        if self.barriers.waiting:
            waiting = self.barriers.number >= 0
            lane = int(np.flatnonzero(waiting)[0])
            cta, thread = self.who(lane)
            parts.append(
                f"{int(waiting.sum())} threads wait at barrier {int(self.barriers.number[lane])} "
                f"(first: CTA {cta} thread {thread})"
            )
        return "; ".join(parts)


def _part(q: np.ndarray, m: Mask, taken: int, other: int) -> Groups:
    """The threads `m` part: those of `q` take a branch."""
    if m is None and q.all():
        return [(taken, None)]
    if m is None and not q.any():
        return [(other, None)]
    return ([(taken, q)] if q.any() else []) + _others(q, m, other)


def _others(q: Mask, m: Mask, number: int) -> Groups:
    """The threads of `m` for which a predicate does not hold."""
    if q is None:
        return []
    rest = ~q if m is None else m & ~q
    return [(number, rest)] if rest.any() else []


def _instruction_of(error: BaseException, function: Callable[..., Any]) -> Instruction | None:
    """The instruction of a block's function in which an error came up."""
    line, traceback = None, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code is function.__code__:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    owners = function.owners  # type: ignore[attr-defined]
    return owners[line - 1] if line is not None and line <= len(owners) else None
