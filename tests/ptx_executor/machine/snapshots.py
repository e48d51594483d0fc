"""Earlier states of a batch, by which waiting in a loop is noticed."""

from __future__ import annotations

from typing import Any

import numpy as np

Mask = np.ndarray | None


def _equal(a: Mask, b: Mask) -> bool:
    if a is b:
        return True
    if a is None or b is None:
        return False
    return np.array_equal(a.view(np.uint8), b.view(np.uint8))


class Snapshot:
    """All that decides how a batch goes on, but for global memory."""

    def __init__(self, batch: Any, number: int, m: Mask) -> None:
        self._number, self._m = number, m
        self.version = batch.global_memory.version
        self.progress = batch.progress
        self.left = 4 * batch.snapshot_gap  # blocks for which it is compared
        self._groups = dict(batch.groups)
        self._regs = list(batch.regs)
        self._differed = 0  # the register that was different last time
        self._barriers = batch.barriers.block.copy(), batch.barriers.number.copy()
        self._shared = batch.shared.raw.copy()
        self._local = batch.local.raw.copy() if batch.local is not None else None
        self._mbarriers = _mbarriers(batch)
        # The threads that have run since; None: any may have.
        self._ran = m.copy() if m is not None else None

    def note(self, m: Mask) -> None:
        """These threads run."""
        if self._ran is not None:
            self._ran = None if m is None else self._ran | m

    def has_run(self, m: Mask) -> bool:
        """Whether any of these threads may have run since."""
        return m is None or self._ran is None or bool((m & self._ran).any())

    def equals(self, batch: Any, number: int, m: Mask) -> bool:
        """Whether the batch, about to run a block, is as it was."""
        if number != self._number or not self._same_registers(batch.regs):
            return False
        barriers = batch.barriers
        return (
            _equal(m, self._m)
            and self._groups.keys() == batch.groups.keys()
            and all(_equal(mask, batch.groups[block]) for block, mask in self._groups.items())
            and np.array_equal(self._barriers[0], barriers.block)
            and np.array_equal(self._barriers[1], barriers.number)
            and np.array_equal(self._shared, batch.shared.raw)
            and self._mbarriers == _mbarriers(batch)
            and (self._local is None or np.array_equal(self._local, batch.local.raw))
        )

    def _same_registers(self, regs: list[np.ndarray]) -> bool:
        if regs and not _equal(regs[self._differed], self._regs[self._differed]):
            return False
        for i, value in enumerate(self._regs):
            if regs[i] is not value and not _equal(regs[i], value):
                self._differed = i
                return False
        return True


def _mbarriers(batch: Any) -> dict[int, tuple[int, int, int]]:
    return {place: (b.phase, b.pending, b.tx) for place, b in batch.mbarriers.items()}
