"""Ratios of running times, measured so that noise affects all sides alike.

Absolute times on a shared or thermally limited machine mean little. So every round runs all
variants, in a new random order, and yields one ratio to the baseline per variant; the report shows
the median over rounds with its quartiles.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Step = Callable[[], object]
Timer = Callable[[Step, int], float]
"""Seconds that a number of calls take together."""

# A sample shorter than this is mostly timer and launch noise.
SAMPLE_SECONDS = 0.01
# More than the last-level cache of any GPU so far.
FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Ratio:
    """Time of a variant over the time of the baseline: median and quartiles over rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Timings:
    """Seconds per call: one entry per round and variant, the rounds of all variants aligned."""

    seconds: Mapping[str, list[float]]

    def ratio(self, variant: str, baseline: str) -> Ratio:
        """The time of ``variant`` over that of ``baseline``."""
        pairs = zip(self.seconds[variant], self.seconds[baseline], strict=True)
        ratios = [a / b for a, b in pairs]
        if len(ratios) < 2:
            return Ratio(ratios[0], ratios[0], ratios[0])
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return Ratio(median, low, high)

    def median(self, variant: str) -> float:
        return statistics.median(self.seconds[variant])


def measure(
    steps: Mapping[str, Step],
    *,
    rounds: int,
    device: torch.device,
    sample_seconds: float = SAMPLE_SECONDS,
    seed: int = 0,
) -> Timings:
    """Time every step in ``rounds`` interleaved rounds after a warm-up."""
    timer = cuda_timer(device) if device.type == "cuda" else _cpu_time
    calls = {name: _calls_per_sample(step, timer, sample_seconds) for name, step in steps.items()}
    return interleaved(steps, calls, rounds=rounds, timer=timer, seed=seed)


def interleaved(
    steps: Mapping[str, Step],
    calls: Mapping[str, int],
    *,
    rounds: int,
    timer: Timer,
    seed: int = 0,
) -> Timings:
    """Time every step, ``calls`` of it in a sample, once in each of ``rounds`` rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(seed).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(timer(steps[name], calls[name]) / calls[name])
    return Timings(seconds)


def _calls_per_sample(step: Step, timer: Timer, sample_seconds: float) -> int:
    """How many calls fill a sample; the first, unmeasured calls compile and allocate."""
    for _ in range(3):
        step()
    return max(1, round(sample_seconds / max(timer(step, 1), 1e-7)))


def _cpu_time(step: Step, calls: int) -> float:
    """CPU time of this process: with one thread, the wall time without other processes' work."""
    started = time.process_time()
    for _ in range(calls):
        step()
    return time.process_time() - started


def cuda_timer(device: torch.device) -> Timer:
    """Times each call by CUDA events, from an idle device and with nothing in its cache."""
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.int8).to(device)

    def time_calls(step: Step, calls: int) -> float:
        milliseconds = 0.0
        for _ in range(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda.synchronize(device)
            start.record()
            step()
            end.record()
            torch.cuda.synchronize(device)
            milliseconds += start.elapsed_time(end)
        return milliseconds / 1e3

    return time_calls
