"""Picks the plan of a query: from the cache, by timing the candidates once, or from the model."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..kernels import environment, out_of_resources
from . import cost_model, timing
from .cache import Cache, versions
from .plans import Plan, Query, candidates
from .timing import Measured, Timer

logger = logging.getLogger("lora_fast.tuning")

# Device time that the candidates of one query may take together, compilation not counted.
_BUDGET_SECONDS = 2.0
# A query that takes longer is named on the terminal, while it is timed.
_SILENT_SECONDS = 1.0
# Time that the other ranks of a run wait in all for what rank 0 stores.
_PATIENCE_SECONDS = 30.0


class Place(NamedTuple):
    """A device to Triton: its name, and its compute capability (90), None without one."""

    name: str
    arch: int | None


class Tuner:
    """One plan for each query and device, fixed once it is chosen.

    So the first call and the second are bitwise equal, whatever is timed in between. What is timed
    is stored: rank 0 times and writes, the other ranks of a run read its file. The model chooses
    where nothing may be timed (timing.py), where the file cannot be written, under
    torch.use_deterministic_algorithms, and everything if `times` is False. If a candidate does not
    fit the device, the smaller configuration that ran is timed and stored.
    """

    def __init__(self, *, times: bool, timer: Timer | None = None) -> None:
        self.times = times
        self._timer = timer
        self._chosen: dict[tuple[Place, Query, bool], Plan] = {}
        self._caches: dict[str, Cache] = {}
        self._lock = threading.Lock()
        self._patience = _PATIENCE_SECONDS

    def plan(self, query: Query, device: torch.device, run: Callable[[Plan], Any]) -> Plan:
        """The plan of `query` on `device`; run(plan) computes the operation with a candidate."""
        asked = (place_of(device), query, torch.are_deterministic_algorithms_enabled())
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

    def chosen(self, device: torch.device) -> list[tuple[Query, Plan]]:
        """The queries that were met so far on `device`, and their plans, with the setting of
        torch.use_deterministic_algorithms as it is."""
        if not self._chosen:
            return []
        place, deterministic = place_of(device), torch.are_deterministic_algorithms_enabled()
        return [
            (query, plan)
            for (at, query, was_deterministic), plan in self._chosen.items()
            if (at, was_deterministic) == (place, deterministic)
        ]

    def _decide(
        self,
        place: Place,
        query: Query,
        deterministic: bool,
        device: torch.device,
        run: Callable[[Plan], Any],
    ) -> Plan:
        plans = cost_model.shortlist(query, place.arch)
        modelled = plans[0]
        has_clock = self._timer is not None or device.type == "cuda"
        if not self.times or deterministic or len(plans) == 1 or not has_clock:
            return modelled
        cache = self._caches.setdefault(place.name, Cache(versions(place.name)))
        may_time = timing.reason_not_to_time(device, forward=query.is_forward) is None
        known = self._stored(cache, query, waits=may_time)
        for plan in (modelled, *candidates(query, place.arch)):
            for fitting_plan in _descent(plan):
                if fitting_plan.name == known:
                    return fitting_plan
        if not may_time or timing.rank() != 0 or not cache.is_writable():
            return modelled
        times = self._time(plans, query, run)
        if not times:
            return modelled
        fastest = min(times, key=times.__getitem__)
        measured = {plan.name: times[plan] for plan in times}
        cache.put(query.key, fastest.name, measured, instead_of=known)
        return fastest

    def _stored(self, cache: Cache, query: Query, *, waits: bool) -> str | None:
        """The name in the file; a rank that is not the first waits a while for it, unless nobody
        can write it."""
        known = cache.get(query.key)
        if known is not None or timing.rank() == 0 or not waits or not cache.is_writable():
            return known
        started = time.monotonic()
        known = cache.wait_for(query.key, self._patience)
        self._patience = max(0.0, self._patience - (time.monotonic() - started))
        return known

    def _time(
        self, plans: Sequence[Plan], query: Query, run: Callable[[Plan], Any]
    ) -> dict[Plan, float]:
        """Milliseconds of the plans that ran, within the budget of device time."""
        times: dict[Plan, float] = {}
        left = _BUDGET_SECONDS
        line = f"lora_fast: timing {len(plans)} ways to compute {query.summary}, once"
        slow = threading.Timer(_SILENT_SECONDS, _say, [line])
        slow.daemon = True
        slow.start()
        try:
            for plan in plans:
                # Each runs twice at least.
                if left <= 2e-3 * min(times.values(), default=0.0):
                    break
                try:
                    ran, found = self._time_what_fits(plan, run, left)
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
                    continue
                times.setdefault(ran, found.milliseconds)
                left -= found.seconds
        finally:
            slow.cancel()
        return times

    def _time_what_fits(
        self, plan: Plan, run: Callable[[Plan], Any], left: float
    ) -> tuple[Plan, Measured]:
        """The plan with the tiles that fit the device, and what it took."""
        timer = self._timer or timing.on_device
        while True:
            with out_of_resources.recording_drops() as drops:
                took = timer(functools.partial(run, plan), left)
            order = [config.gemm for config in _descent(plan)]
            tried = {smaller for asked, smaller in drops if asked in order}
            if not tried:
                return plan, took
            # If one of several launches does not fit, all are timed with the tile that fits.
            plan = plan._replace(gemm=max(tried, key=order.index))


def _say(line: str) -> None:
    """A line of progress: to the handlers of this logger, else to the terminal."""
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info(line)
    else:
        print(line, file=sys.stderr, flush=True)


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


def _times_by_environment() -> bool:
    value = os.environ.get("LORA_FAST_AUTOTUNE", "1")
    if value not in ("0", "1"):
        raise ValueError(f"LORA_FAST_AUTOTUNE must be 0 or 1, got {value!r}")
    return value == "1"


tuner = Tuner(times=_times_by_environment())
"""The process's own; with LORA_FAST_AUTOTUNE=0 it times nothing and reads no file."""
