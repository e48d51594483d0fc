"""Picks the plan of a query: from the model, from the cache, or by timing the candidates once."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..kernels import environment, out_of_resources
from . import cost_model
from .cache import Cache, versions
from .plans import Plan, Query, candidates

Timer = Callable[[Callable[[], Any]], float]


def milliseconds(call: Callable[[], Any]) -> float:
    """Median device time of a call, with a cold L2, on the current device and stream."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=20, return_mode="median"))


class Place(NamedTuple):
    """A device to Triton: its name, and its compute capability (90), None without one."""

    name: str
    arch: int | None


class Tuner:
    """One plan for each query and device, fixed once it is chosen.

    So the first call and the second are bitwise equal, whatever is timed in between. If a candidate
    does not fit the device, the smaller configuration that ran is timed and stored. While a CUDA
    graph is captured or torch.compile traces, nothing is timed: the cache answers, or the model.
    Every process chooses for itself; ranks with different choices differ by rounding, within the
    same error bound.
    """

    def __init__(self, *, times: bool, timer: Timer = milliseconds) -> None:
        self.times = times
        self._timer = timer
        self._chosen: dict[tuple[Place, Query], Plan] = {}
        self._caches: dict[str, Cache] = {}
        self._lock = threading.Lock()

    def plan(self, query: Query, device: torch.device, run: Callable[[Plan], Any]) -> Plan:
        """The plan of `query` on `device`; run(plan) computes the operation with a candidate."""
        asked = (place_of(device), query)
        found = self._chosen.get(asked)
        if found is None:
            # Backward passes run in threads of their own; candidates are timed one at a time.
            with self._lock, torch.cuda.device(device if device.type == "cuda" else -1):
                found = self._chosen.get(asked) or self._decide(*asked, device, run)
                self._chosen[asked] = found
        return found

    def kept(self) -> dict[Path, int]:
        """The cache files in use, and how many plans each holds."""
        return {cache.path: len(cache) for cache in self._caches.values()}

    def _decide(
        self, place: Place, query: Query, device: torch.device, run: Callable[[Plan], Any]
    ) -> Plan:
        plans = candidates(query, place.arch)
        modelled = cost_model.pick(query, place.arch)
        if not self.times or len(plans) == 1:
            return modelled
        cache = self._caches.setdefault(place.name, Cache(versions(place.name)))
        known = cache.get(query.key)
        for plan in plans:
            for fitting_plan in _descent(plan):
                if fitting_plan.name == known:
                    return fitting_plan
        if torch.compiler.is_compiling() or _is_capturing(device):
            return modelled
        times = self._time(plans, query, run)
        if not times:
            return modelled
        fastest = min(times, key=times.__getitem__)
        measured = {plan.name: times[plan] for plan in times}
        cache.put(query.key, fastest.name, measured, instead_of=known)
        return fastest

    def _time(
        self, plans: tuple[Plan, ...], query: Query, run: Callable[[Plan], Any]
    ) -> dict[Plan, float]:
        times: dict[Plan, float] = {}
        for plan in plans:
            try:
                ran, took = self._time_what_fits(plan, run)
                times.setdefault(ran, took)
            except torch.OutOfMemoryError:
                # A candidate that does not fit into the free memory is skipped.
                continue
            except Exception as error:
                # Any error of the compiler or launch; if no plan works, the call itself raises.
                warnings.warn(
                    f"lora_fast: {plan.name} cannot compute {query.key}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return times

    def _time_what_fits(self, plan: Plan, run: Callable[[Plan], Any]) -> tuple[Plan, float]:
        """The plan with the tiles that fit the device, and its milliseconds."""
        while True:
            with out_of_resources.recording_drops() as drops:
                took = self._timer(functools.partial(run, plan))
            order = [config.gemm for config in _descent(plan)]
            tried = {smaller for asked, smaller in drops if asked in order}
            if not tried:
                return plan, took
            # If one of several launches does not fit, all are timed with the tile that fits.
            plan = plan._replace(gemm=max(tried, key=order.index))


def _descent(plan: Plan) -> Iterator[Plan]:
    """The plan, followed by its replacements where it does not fit."""
    if plan.gemm is None:
        yield plan
    else:
        yield from (plan._replace(gemm=config) for config in out_of_resources.descent(plan.gemm))


def place_of(device: torch.device) -> Place:
    """Name and compute capability of the device that tensors of `device` are computed on."""
    if device.type == "cuda":
        return _gpu(torch.cuda.current_device() if device.index is None else device.index)
    arch = environment.current_arch()
    return Place(device.type if arch is None else f"sm_{arch}", arch)


@functools.cache
def _gpu(device: int) -> Place:
    properties = torch.cuda.get_device_properties(device)
    # AMD's numbers are not compute capabilities: gfx942 would be taken for sm_94.
    arch = None if torch.version.hip else 10 * properties.major + properties.minor
    return Place(properties.name, arch)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _times_by_environment() -> bool:
    value = os.environ.get("LORA_FAST_AUTOTUNE", "0")
    if value not in ("0", "1"):
        raise ValueError(f"LORA_FAST_AUTOTUNE must be 0 or 1, got {value!r}")
    return value == "1"


tuner = Tuner(times=_times_by_environment())
"""The process's own; LORA_FAST_AUTOTUNE=1 lets it time."""
