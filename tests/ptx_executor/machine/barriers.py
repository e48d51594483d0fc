"""bar.sync and bar.arrive: threads of a CTA that wait for each other."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import PTXError
from ..translation.blocks import Block

Mask = np.ndarray | None
Groups = list[tuple[int, Mask]]  # threads that go on: (block, mask)
Key = tuple[int, int]  # (CTA of the batch, number of the barrier)


class Barriers:
    """Who waits at which barrier of a batch."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self.block = np.full(state.lanes, -1, np.int64)  # where a waiting thread goes on
        self.number = np.full(state.lanes, -1, np.int64)  # at which barrier it waits
        self.waiting = False
        self._needed: dict[Key, int | None] = {}  # threads; None: all of the CTA
        self._arrived: dict[Key, list[np.ndarray]] = {}  # by bar.arrive

    def reach(self, block: Block, m: Mask, q: Mask) -> Groups:
        """Threads `m` reach the barrier at the end of a block; its predicate holds for `q`."""
        state, ins = self._state, block.last
        assert ins
        if ins.has("red"):
            state.unsupported(ins, "barrier reduction")
        groups: Groups = []
        if ins.pred is not None:
            assert q is not None
            skipping = ~q if m is None else m & ~q
            groups = [(block.next, skipping)] if skipping.any() else []
            if not q.any():
                return groups
            m = q
        number, count = [*ins.args, None][:2] if ins.args else (("i", 0), None)
        if m is None and count is None and not state.exited and not self.waiting:
            state.shared.barrier()
            return [(block.next, None)]
        arrives = "arrive" in ins.mods
        mask = np.ones(state.lanes, bool) if m is None else m
        try:
            met = self._meet(block.next, mask, self._value(number), count, arrives)
        except PTXError as error:
            raise error.at(state.program.name, ins) from None
        if arrives:
            groups.append((block.next, m))
        for key in met:
            groups += self._release(key)
        return groups

    def _value(self, op: Any) -> np.ndarray:
        state = self._state
        if op[0] == "i":
            return np.full(state.lanes, op[1])
        return state.regs[op[1]].astype(np.int64)

    def _meet(self, after, mask, numbers, count, arrives) -> set[Key]:
        """Note the threads of a mask; the barriers that they have reached."""
        state = self._state
        met = set()
        for cta in map(int, np.unique(state.lane_cta[mask])):
            here = mask & (state.lane_cta == cta)
            for number in map(int, np.unique(numbers[here])):
                key, threads = (cta, number), here & (numbers == number)
                self._need(key, None if count is None else np.unique(self._value(count)[threads]))
                if arrives:
                    self._arrived.setdefault(key, []).append(threads)
                else:
                    self.block[threads] = after
                    self.number[threads] = number
                    self.waiting = True
                met.add(key)
        return met

    def _need(self, key: Key, counts: np.ndarray | None) -> None:
        cta = self._state.ctas[key[0]]
        if counts is not None and counts.size != 1:
            raise PTXError("barrier with differing thread counts", cta)
        needed = None if counts is None else int(counts[0])
        before = self._needed.setdefault(key, needed)
        if before != needed:
            text = f"barrier {key[1]} used with thread counts {before} and {needed}"
            raise PTXError(text, cta)

    def _release(self, key: Key) -> Groups:
        """The threads that a barrier lets go on, if all have come."""
        if key not in self._needed:
            return []
        state, (cta, number) = self._state, key
        here = (self.number == number) & (state.lane_cta == cta)
        everybody = [here, *self._arrived.get(key, [])]
        if not self._is_complete(key, everybody):
            return []
        del self._needed[key]
        self._arrived.pop(key, None)
        if state.shared.clocks:
            met = set().union(*(_warps(threads) for threads in everybody))
            warps = sorted(bw - cta * state.warps for bw in met)
            if warps:
                state.shared.barrier([cta], None if len(warps) == state.warps else warps)
        groups: Groups = []
        for block in np.unique(self.block[here]):
            mask = here & (self.block == block)
            groups.append((int(block), None if not state.exited and mask.all() else mask))
        self.number[here] = self.block[here] = -1
        self.waiting = bool((self.number >= 0).any())
        state.progress = True
        return groups

    def _is_complete(self, key: Key, everybody: list[np.ndarray]) -> bool:
        state, needed = self._state, self._needed[key]
        present = np.logical_or.reduce(everybody) | ~state.alive
        if needed is None:
            return bool((present | (state.lane_cta != key[0])).all())
        # Whole warps take part, also when some of their threads have exited.
        warps = [_warps(threads) for threads in everybody]
        if not present.reshape(-1, 32)[list(set().union(*warps))].all():
            return False
        count = 32 * sum(map(len, warps))
        if count > needed:
            text = f"{count} threads at barrier {key[1]}, which expects {needed}"
            raise PTXError(text, state.ctas[key[0]])
        return count == needed

    def release_all(self) -> Groups:
        """After threads have exited, for whom nobody waits any longer."""
        groups: Groups = []
        if self.waiting:
            for key in list(self._needed):
                groups += self._release(key)
        return groups


def _warps(threads: np.ndarray) -> set[int]:
    """The warps of the batch that these threads are of."""
    return set(np.unique(np.flatnonzero(threads) // 32).tolist())
