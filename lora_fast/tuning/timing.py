"""Timing a call on its device, within a budget, and the times at which nothing may be timed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# Of one candidate: so much device time, between this many and that many calls.
_SECONDS, _LEAST, _MOST = 0.1, 3, 25


class Measured(NamedTuple):
    """The median of some calls, and the seconds of device time that all of them took."""

    milliseconds: float
    seconds: float


Timer = Callable[[Callable[[], Any], float], Measured]
"""Takes a call and the seconds that are left for it."""


def on_device(call: Callable[[], Any], seconds: float) -> Measured:
    """Device time of a call on the current device and stream, with a cold L2.

    The first call compiles, so that it counts as long as the second; as few calls follow as fit
    into `seconds` with it, but one.
    """
    call()
    evicted = _l2_sized()
    torch.cuda.synchronize()
    started = time.perf_counter()
    times: list[float] = []
    while len(times) < _MOST:
        if evicted is not None:
            evicted.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
        first, spent = times[0] / 1e3, time.perf_counter() - started
        is_enough = len(times) >= _LEAST and spent > _SECONDS
        if is_enough or first + spent + times[-1] / 1e3 > seconds:
            break
    return Measured(statistics.median(times), first + time.perf_counter() - started)


def _l2_sized() -> torch.Tensor | None:
    """Memory whose writing evicts all else from the L2; None where it is not to be had."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        return torch.empty(properties.L2_cache_size, dtype=torch.uint8, device="cuda")
    except (torch.OutOfMemoryError, AttributeError):
        return None


def reason_not_to_time(device: torch.device, *, forward: bool) -> str | None:
    """Why nothing may be timed at this moment; None if it may.

    What is captured or traced must not hold a candidate's launches. In a backward pass a forward
    one is the recomputation of one that had its choice.
    """
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured"
    if forward and torch._C._current_graph_task_id() != -1:
        return "a forward pass is recomputed"
    return None


def rank() -> int:
    """This process's rank among those that train together; 0 alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    value = os.environ.get("RANK", "0")
    return int(value) if value.isdecimal() else 0
