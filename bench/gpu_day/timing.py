"""Times contestants against one another on a GPU, launch by launch and as CUDA graphs.

Each call is timed by CUDA events on an idle device: the cache is flushed, the device synchronised,
and the call runs between two events. So ``eager`` includes the launches of the call, and ``graph``,
the replay of the same call from a CUDA graph, almost none. Contestants take turns in random order.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from bench.instruments.paired import Step, Timings, cuda_timer, interleaved

from . import absent
from .day import Day
from .device import clocks_under


def contest(day: Day, makers: Mapping[str, Callable[[], Step]], *, baseline: str) -> dict[str, Any]:
    """The row of one comparison. A contestant that cannot run is left out, with the reason.

    ``makers``: functions that build the contestants; each call of one is the whole step. ``ok`` is
    False if a contestant of ours is left out: one whose name begins with lora_fast. Raises what
    ours or the baseline raise for a package that is not installed.
    """
    steps: dict[str, Step] = {}
    contestants: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        try:
            steps[name] = _ready(make, day)
            contestants[name] = {"peak_bytes": _peak_bytes(steps[name], day)}
        except Exception as error:
            if absent.named_by(error) and (name == baseline or name.startswith("lora_fast")):
                raise
            contestants[name] = {"failed": _reason(error)}
            _raise_if_lost(day)
    if steps:
        _raise_clocks(next(iter(steps.values())), day)
        _fill(contestants, "eager", _timings(steps, day), baseline)
    captured = _captured(steps, contestants, day)
    if captured:
        _fill(contestants, "graph", _timings(captured, day), baseline)
    ours = [found for name, found in contestants.items() if name.startswith("lora_fast")]
    row: dict[str, Any] = {
        "contestants": contestants,
        "baseline": baseline,
        "ok": not any("failed" in found for found in ours),
        "summary": _summary(contestants),
    }
    if baseline in steps:
        row["clocks"] = clocks_under(steps[baseline], day)
    if any("graph_failed" in found for found in contestants.values()):
        row["new_process"] = (
            True  # an aborted capture can leave generators and streams inconsistent
        )
    return row


def median_seconds(step: Step, day: Day) -> float:
    """The median time of one call."""
    return _timings({"": _ready(lambda: step, day)}, day).median("")


def _raise_clocks(step: Step, day: Day) -> None:
    """Keep the device busy for a moment, since it was idle while contestants were built."""
    until = time.monotonic() + day.seconds / 10
    while time.monotonic() < until:
        step()
        torch.cuda.synchronize(day.device)


def _ready(make: Callable[[], Step], day: Day) -> Step:
    """Build and call it: the first calls compile and allocate."""
    step = make()
    for _ in range(day.warm_up_calls):
        step()
    torch.cuda.synchronize(day.device)
    return step


def _timings(steps: Mapping[str, Step], day: Day) -> Timings:
    timer = cuda_timer(day.device)
    least, most = day.rounds
    rounds = least
    if least < most:
        one_round = sum(timer(step, 1) for step in steps.values())
        rounds = min(most, max(least, round(day.seconds / max(one_round, 1e-6))))
    return interleaved(steps, dict.fromkeys(steps, 1), rounds=rounds, timer=timer)


def _captured(
    steps: Mapping[str, Step], contestants: dict[str, dict[str, Any]], day: Day
) -> dict[str, Step]:
    """A replay for every step that a CUDA graph can hold, all in one pool of memory."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    replays: dict[str, Step] = {}
    for name, step in steps.items():
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.synchronize(day.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                step()
            graph.replay()
            torch.cuda.synchronize(day.device)
            replays[name] = graph.replay
        except Exception as error:
            contestants[name]["graph_failed"] = _reason(error)
            _raise_if_lost(day)
    return replays


def _peak_bytes(step: Step, day: Day) -> int:
    """Peak bytes of a call beyond those allocated before it."""
    torch.cuda.synchronize(day.device)
    before = torch.cuda.memory_allocated(day.device)
    torch.cuda.reset_peak_memory_stats(day.device)
    step()
    torch.cuda.synchronize(day.device)
    return int(torch.cuda.max_memory_allocated(day.device) - before)


def _fill(
    contestants: dict[str, dict[str, Any]], mode: str, timings: Timings, baseline: str
) -> None:
    for name, seconds in timings.seconds.items():
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        found: dict[str, Any] = {
            "seconds": {"median": median, "low": low, "high": high, "rounds": len(seconds)}
        }
        if baseline in timings.seconds:
            found["over_baseline"] = asdict(timings.ratio(name, baseline))
        contestants[name][mode] = found


def _summary(contestants: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for name, found in contestants.items():
        if "failed" in found:
            parts.append(f"{name} failed ({found['failed'][:60]})")
        elif "over_baseline" in found["eager"]:
            best = found.get("graph", found["eager"])
            parts.append(f"{name} {best['over_baseline']['median']:.3f}")
    return ", ".join(parts)


def _reason(error: Exception) -> str:
    lines = f"{type(error).__name__}: {error}".splitlines()
    return lines[0][:300]


def _raise_if_lost(day: Day) -> None:
    """Continue with the other contestants only if the device still responds."""
    torch.cuda.synchronize(day.device)
