"""Fences between the generic proxy and the asynchronous one.

wgmma, tcgen05.mma and bulk copies read shared memory through the asynchronous proxy. What st,
stmatrix or cp.async wrote, through the generic one, they see only if a fence.proxy.async lies on
the path that orders the write before the read: after the write (a cp.async's wait), before the
read, by the writing warp, the reading one or one in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class ProxyFences:
    """``fenced[c, a, b]``: the time up to which writes by warp b of CTA c are fenced for warp a."""

    def __init__(self, ctas: int, warps: int) -> None:
        self.fenced = np.zeros((ctas, warps, warps), np.int32)
        self._met = np.zeros((ctas, warps), np.int32)  # the last barrier of each warp's threads

    def fence(self, seen: np.ndarray, now: int, cta: int, warp: int, *, whole: bool) -> None:
        """A warp fences what it knows of: `seen` times, and its own writes.

        Of a fence by some threads only (not `whole`) the others know after a barrier: it covers
        what the warp wrote before the last one.
        """
        known = seen.copy()
        known[warp] = now if whole else self._met[cta, warp]
        self.fenced[cta, warp] = np.maximum(self.fenced[cta, warp], known)

    def barrier(self, ctas: Any, warps: Sequence[int] | None, now: int) -> None:
        """All warps of these CTAs, or these of them, meet and share what is fenced."""
        if warps is None:
            self.fenced[ctas] = self.fenced[ctas].max(axis=1)[:, None, :]
            self._met[ctas] = now
        else:
            for cta in ctas:
                self.fenced[cta, warps] = self.fenced[cta, warps].max(axis=0)
                self._met[cta, warps] = now

    def missing(
        self, written_at: np.ndarray, written_by: np.ndarray, limit: Callable[..., np.ndarray]
    ) -> np.ndarray:
        """Which granules are unfenced: `limit` gives the times of the reader for the writers."""
        is_generic = written_by < self.fenced.shape[1]
        return is_generic & (written_at > limit(np.where(is_generic, written_by, 0)))
