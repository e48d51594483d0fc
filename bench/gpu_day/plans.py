"""Every plan by which the library could compute a layer, timed beside the one it picks.

The tuner's candidates: fused kernels with each configuration, NF4 decoded before or inside the
product, and products by cuBLAS. A plan is forced by replacing the tuner.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from bench.instruments.paired import Step
from bench.linear_cases import Case, build
from lora_fast.backends import triton_ops
from lora_fast.tuning import cost_model
from lora_fast.tuning.plans import BACKWARD, FORWARD, FUSED, Plan, Query, candidates

from .day import Day
from .run_units import Unit
from .timing import contest

_SECONDS = 1.0
# (K, N) of Llama-3-8B: q and o, gate and up, down, k and v.
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024))
_WEIGHTS = ("dense", "nf4")
_MAKES = {FORWARD: "forward", BACKWARD: "forward+backward"}


class _Fixed:
    """Answers every query with ``choose(query)``, and records the queries."""

    times = True

    def __init__(self, choose: Callable[[Query], Plan]) -> None:
        self._choose = choose
        self.queries: list[Query] = []

    def plan(self, query: Query, device: torch.device, run: Any) -> Plan:
        self.queries.append(query)
        return self._choose(query)


@contextlib.contextmanager
def _in_place_of_the_tuner(tuner: _Fixed) -> Iterator[None]:
    chosen: Any = triton_ops.tuner
    triton_ops.tuner = tuner  # type: ignore[assignment]
    try:
        yield
    finally:
        triton_ops.tuner = chosen


def fixed(make: Callable[[], Step], plan: Plan) -> Callable[[], Step]:
    """A maker of the same step by one plan, in both directions."""
    return _by(make, _Fixed(lambda query: plan))


def _by(make: Callable[[], Step], tuner: _Fixed) -> Callable[[], Step]:
    def made() -> Step:
        with _in_place_of_the_tuner(tuner):
            step = make()

        def run() -> object:
            tuner.queries.clear()
            with _in_place_of_the_tuner(tuner):
                return step()

        return run

    return made


def units(day: Day) -> list[Unit]:
    """Forward and backward of Llama-3-8B's linears, few and many rows."""
    if day.rehearsal:
        cases = [_case(8, (64, 64), weight, p) for weight in _WEIGHTS for p in (0.0, 0.1)]
    else:
        every = itertools.product((8192, 2048, 512, 64), SHAPES, _WEIGHTS)
        cases = [_case(M, shape, weight) for M, shape, weight in every]
        cases += [_case(8192, SHAPES[0], weight, 0.1) for weight in _WEIGHTS]
    return [
        Unit(f"{case} {op}", lambda case=case, op=op: _measured(day, case, op))
        for case in cases
        for op in _MAKES
    ]


def _case(M: int, shape: tuple[int, int], weight: str, p: float = 0.0) -> Case:
    return Case(M, *shape, 16, torch.bfloat16, weight, p, torch.bfloat16)


def _measured(day: Day, case: Case, op: str) -> dict[str, Any]:
    """All candidates of one direction; the backward pass is timed with the same forward pass."""
    layer = build(case, day.device)["lora_fast"]
    step = layer.step(_MAKES[op])
    query = _query(step, op)

    def maker(plan: Plan) -> Callable[[], Step]:
        return _by(lambda: step, _Fixed(lambda q: plan if q.op == op else FUSED))

    ways = (FUSED,) if query is None else candidates(query, day.arch)
    found = {plan.name: plan for plan in ways}
    makers = {name: maker(plan) for name, plan in found.items()}
    shorter = replace(day, seconds=min(day.seconds, _SECONDS))
    row = contest(shorter, makers, baseline=next(iter(found)))
    return {
        **row,
        "ok": not any("failed" in contestant for contestant in row["contestants"].values()),
        **({} if query is None else _modelled(query, day.arch, found)),
    }


def _modelled(query: Query, arch: int, found: dict[str, Plan]) -> dict[str, Any]:
    """The choice without a clock, and the modelled times; the first candidate is FUSED for this
    query."""
    picked = cost_model.pick(query, arch)
    return {
        "picked": next(iter(found)) if picked == FUSED else picked.name,
        "modelled_seconds": {
            name: cost_model.seconds(plan, query, arch) for name, plan in found.items()
        },
    }


def _query(step: Step, op: str) -> Query | None:
    """The query that the layer makes for ``op``; None from a backend with a single plan."""
    tuner = _Fixed(lambda query: FUSED)
    with _in_place_of_the_tuner(tuner):
        step()
    if not tuner.queries:
        return None
    (query,) = (query for query in tuner.queries if query.op == op)
    return query._replace(cublas=True)
