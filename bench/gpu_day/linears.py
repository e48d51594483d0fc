"""One adapted linear layer in many sizes; NF4 by both routes; few rows without gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from lora_fast.kernels import launch_policy

import lora_fast
from bench.instruments.paired import Step
from bench.linear_cases import DIRECTIONS, Case, Layer, build, fused_calls
from lora_fast.backends.choice import BackendName
from lora_fast.tuning.plans import Plan

from . import plans
from .day import Day
from .plans import SHAPES
from .run_units import Unit
from .timing import contest

_SECONDS = 1.0
"""Time of one comparison: there are many."""

FLOOR = {"dense": "frozen", "nf4": "bitsandbytes"}
"""The frozen layer as it is stored. For NF4 the dense one runs beside it."""

_SQUARE = SHAPES[0]
_TINY = (64, 64)


def sweep(day: Day) -> list[Unit]:
    """Both directions of every shape; other ranks and dropout for one shape."""
    if day.rehearsal:
        cases = [_case(weight, 8, _TINY, 4) for weight in ("dense", "nf4")]
    else:
        weights = ("dense", "nf4")
        cases = [_case(w, 8192, shape, 16) for shape in SHAPES for w in weights]
        cases += [_case(w, 8192, _SQUARE, R) for R in (64, 256) for w in weights]
        cases += [_case(w, 8192, _SQUARE, 16, 0.1) for w in weights]
        cases += [_case(w, M, shape, 16) for M in (2048, 512) for shape in SHAPES for w in weights]
    return [
        Unit(f"{case} {direction}", lambda case=case, way=direction: _measured(day, case, way))
        for case in cases
        for direction in reversed(DIRECTIONS)
    ]


def crossover(day: Day) -> list[Unit]:
    """The number of rows from which decoding NF4 in a separate launch is faster."""
    rows = (8,) if day.rehearsal else (16, 32, 64, 128, 256, 512, 1024, 2048)
    shapes = (_TINY,) if day.rehearsal else (_SQUARE, (4096, 14336))
    cases = [_case("nf4", M, shape, 16) for shape in shapes for M in rows]
    return [
        Unit(f"{case} {direction}", lambda case=case, way=direction: _routes(day, case, way))
        for case in cases
        for direction in DIRECTIONS
    ]


def inference(day: Day) -> list[Unit]:
    """A forward pass without gradients, as in generation."""
    rows = (1,) if day.rehearsal else (1, 4, 16, 64)
    shapes = (_TINY,) if day.rehearsal else (_SQUARE, (4096, 14336))
    cases = [_case(w, M, shape, 16) for shape in shapes for M in rows for w in ("dense", "nf4")]
    return [
        Unit(f"{case} inference", lambda case=case: _measured(day, case, "inference"))
        for case in cases
    ]


def _case(weight: str, M: int, shape: tuple[int, int], R: int, p: float = 0.0) -> Case:
    return Case(M, *shape, R, torch.bfloat16, weight, p, torch.bfloat16)


def _measured(day: Day, case: Case, way: str) -> dict[str, Any]:
    layers = build(case, day.device)
    makers = {name: _maker(layer, way) for name, layer in layers.items()}
    ours = layers["lora_fast"]
    makers["lora_fast"] = _fused(ours, way)
    makers["lora_fast fused"] = _fused(ours, way, day.fused)
    makers["lora_fast torch"] = _fused(ours, way, "torch")
    return _row(day, case, way, makers, baseline=FLOOR[case.weight])


def _routes(day: Day, case: Case, way: str) -> dict[str, Any]:
    layers = build(case, day.device)
    dense = build(replace(case, weight="dense"), day.device)["lora_fast"]
    packed = _fused(layers["lora_fast"], way, day.fused)
    makers = {
        "dense W": _fused(dense, way, day.fused),
        "workspace": plans.fixed(packed, Plan(workspace=True)),
        "in the product": plans.fixed(packed, Plan(workspace=False)),
        "bitsandbytes": _maker(layers["bitsandbytes"], way),
    }
    row = _row(day, case, way, makers, baseline="workspace")
    ours = [found for name, found in row["contestants"].items() if name != "bitsandbytes"]
    why = launch_policy.why_nf4_workspace(case.M, case.K, case.dtype, day.arch)
    return {
        **row,
        "ok": not any("failed" in found for found in ours),
        "chosen": "in the product" if why is None else "workspace",
    }


def _row(
    day: Day, case: Case, way: str, makers: dict[str, Callable[[], Step]], *, baseline: str
) -> dict[str, Any]:
    row = contest(replace(day, seconds=min(day.seconds, _SECONDS)), makers, baseline=baseline)
    return {
        **row,
        "weight": case.weight,
        **{name: getattr(case, name) for name in ("M", "K", "N", "R")},
        "p": case.dropout_p,
        "direction": way,
        "work": work(case, way).__dict__,
    }


@dataclass(frozen=True)
class Work:
    """The unavoidable work: FLOPs of the products, each tensor read and written once per pass."""

    flops: int
    bytes: int


def work(case: Case, way: str) -> Work:
    """forward and inference: y. forward+backward: y, dX, dA and dB as well."""
    M, K, N, R = case.M, case.K, case.N, case.R
    passes = 2 if way == "forward+backward" else 1
    W = N * K * (2 if case.weight == "dense" else 0.5)
    base, adapter = 2 * M * N * K * passes, 2 * M * R * (N + K) * (3 if passes == 2 else 1)
    x, y = (3 * M * K, 2 * M * N) if passes == 2 else (M * K, M * N)
    return Work(base + adapter, int(2 * (x + y) + passes * (W + 2 * R * (N + K))))


def _step(layer: Layer, way: str) -> Step:
    if way != "inference":
        return layer.step(way)

    @torch.no_grad()
    def step() -> object:
        return layer.forward()

    return step


def _maker(layer: Layer, way: str) -> Callable[[], Step]:
    return lambda: _step(layer, way)


def _fused(layer: Layer, way: str, backend: BackendName = "auto") -> Callable[[], Step]:
    """Our layer, checked to run fused; ``auto`` with its defaults, cuBLAS included."""

    def make() -> Step:
        step = _step(layer, way)
        if backend != "auto":
            step = _on(backend, step)
        before = fused_calls(layer)
        step()
        if fused_calls(layer) != before + 1:
            raise RuntimeError("the fused path never ran, so nothing would be measured")
        return step

    return make


def _on(backend: BackendName, step: Step) -> Step:
    def run() -> object:
        with lora_fast.set_backend(backend):
            return step()

    return run
