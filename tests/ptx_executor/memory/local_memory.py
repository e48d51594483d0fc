"""Local memory: what a thread spills, and the arguments of the functions that it calls."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import Misaligned, OutOfBounds
from .layout import LOCAL_BASE, SHIFT, host_buffer, views_of


class LocalMemory:
    """Memory of each thread's own for the .local variables of a kernel."""

    def __init__(self, lanes: int, size: int) -> None:
        self.size = size
        self.stride = -(-size // 16) * 16 + 16
        self.raw, _ = host_buffer(lanes * self.stride)
        self.views = views_of(self.raw)

    def _index(self, batch: Any, addr: np.ndarray, size: int, lanes: Any, what: str) -> np.ndarray:
        offset = addr.astype(np.int64) - LOCAL_BASE
        outside = (offset < 0) | (offset > self.size - size)
        bad = outside | (offset % size != 0)
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            error = OutOfBounds if outside[k] else Misaligned
            memory = f"{self.size} bytes at {LOCAL_BASE:#x}"
            raise error(
                f"local {what} of {size} bytes out of bounds or misaligned ({memory})",
                *batch.who(k, lanes),
                int(addr[k]),
            )
        lane = np.arange(batch.lanes) if lanes is None else lanes
        return (offset + lane * self.stride) >> SHIFT[size]

    def load(self, batch, addr, size, lanes, what="load"):
        """The value of every access."""
        return self.views[size][self._index(batch, addr, size, lanes, what)]

    def store(self, batch, addr, size, values, lanes, what="store"):
        """Put every access's value."""
        self.views[size][self._index(batch, addr, size, lanes, what)] = values
