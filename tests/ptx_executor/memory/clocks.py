"""Vector clocks: what a warp knows of the warps of other CTAs."""

from __future__ import annotations

import numpy as np


class Clock:
    """The time up to which warps of other CTAs are known: {CTA: int32 for each warp}; immutable."""

    __slots__ = ("times",)

    def __init__(self, times: dict[int, np.ndarray]) -> None:
        self.times = times

    def covers(self, other: Clock) -> bool:
        """Whether this knows all that `other` knows."""
        mine = self.times
        for cta, theirs in other.times.items():
            known = mine.get(cta)
            if known is None or (known is not theirs and (known < theirs).any()):
                return False
        return True


def join(a: Clock | None, b: Clock | None) -> Clock | None:
    """What either knows; one of the two where it knows all."""
    if a is b or b is None:
        return a
    if a is None:
        return b
    if len(a.times) >= len(b.times) and a.covers(b):
        return a
    if len(b.times) >= len(a.times) and b.covers(a):
        return b
    times = dict(a.times)
    for cta, theirs in b.times.items():
        known = times.get(cta)
        times[cta] = theirs if known is None else np.maximum(known, theirs)
    return Clock(times)
