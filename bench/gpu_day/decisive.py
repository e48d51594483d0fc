"""Measurements that decide the defaults: e for each shape and tile, strips, host time.

    e = time of cuBLAS for the frozen product / time of the product with the low rank in it

Torch and Triton suffice, without PEFT or bitsandbytes. The alternatives to our kernels are written
as calls of PyTorch, forward and backward by x:

    composed   y = x Wᵀ, then y += s·S Bᵀ                  dX = dY W, then dX += dS A
    hybrid     y = s·S Bᵀ, then y += x Wᵀ by cuBLAS        dX = dS A, then dX += dY W by cuBLAS
    augmented  y = [x | S] [W | s·B]ᵀ, one product; with and without the pass that writes [x | S]

with S = x Aᵀ in each. `lora_fast` is our launch with the tile that is picked; others follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from lora_fast.kernels import launch_policy, out_of_resources, strips, ticketed_gemm
from lora_fast.kernels.scaling import Shrunk
from torch import Tensor
from torch.nn import functional as F

import lora_fast
from bench.instruments.paired import Step, interleaved
from lora_fast import NF4Weight
from lora_fast.backends.triton_ops import TritonBackend
from lora_fast.factors import Constants, Factors, Needs
from lora_fast.tuning.plans import AUGMENTED, HYBRID
from lora_fast.tuning.product_speed import tile_name

from . import absent
from .day import Day
from .run_units import Unit
from .tables import best
from .timing import contest

_SECONDS = 0.3
_ROUNDS = (7, 41)
_DTYPE, _RANK, _SCALING = torch.bfloat16, 16, 2.0
# M, K, N: Llama-3-8B's q and o, gate and up, down; fewer rows; a small model's q, k and v.
_SIZES = (
    *((8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096)),
    *((2048, 4096, 4096), (2048, 4096, 14336), (8192, 1024, 3072)),
)
_STRIP_CTAS = (128, 264, 528)
# Rows and width of the layer whose host time is measured: too small to wait for the device.
_SMALL = (128, 512)
_HOST_ROUNDS, _HOST_CALLS = 21, 20
_Makers = dict[str, Callable[[], Step]]


@dataclass(frozen=True)
class Operands:
    """x [M, K], W [N, K], A [R, K], B [N, R], dY [M, N], and S [M, R], dS [M, R] like them."""

    x: Tensor
    W: Tensor
    A: Tensor
    B: Tensor
    dY: Tensor
    S: Tensor
    dS: Tensor

    @classmethod
    def random(cls, day: Day, M: int, K: int, N: int) -> Operands:
        torch.manual_seed(0)
        shapes = ((M, K), (N, K), (_RANK, K), (N, _RANK), (M, N), (M, _RANK), (M, _RANK))
        return cls(*(torch.randn(s, device=day.device, dtype=_DTYPE) for s in shapes))


def units(day: Day) -> list[Unit]:
    """All of the first size, the host's time, then the other sizes."""
    # Kernels that are only compiled may have the real tile sizes.
    tiny = ((8, 64, 64),) if day.computes else ((256, 512, 512),)
    sizes = tiny if day.rehearsal else _SIZES
    short = replace(day, seconds=min(day.seconds, _SECONDS), rounds=min(day.rounds, _ROUNDS))
    found: list[Unit] = []
    for M, K, N in sizes:
        size = f"M{M} K{K} N{N}"
        for name, measure in (("forward", _forward), ("dX", _grad_input), ("strips", _strips)):
            run = _bound(measure, short, M, K, N)
            found.append(Unit(f"{name} {size}", run))
    found.insert(3, Unit("host", lambda: _host(day)))
    return found


def _bound(measure: Any, *arguments: Any) -> Callable[[], dict[str, Any]]:
    return lambda: measure(*arguments)


def forward_ways(o: Operands) -> dict[str, Step]:
    """y [M, N] by calls of PyTorch."""
    (M, K), N = o.x.shape, o.W.shape[0]
    wide, both = o.x.new_empty(M, K + _RANK), o.x.new_empty(N, K + _RANK)
    both[:, :K], both[:, K:] = o.W, _SCALING * o.B

    def composed() -> Tensor:
        y = F.linear(o.x, o.W)
        return y.addmm_(o.x @ o.A.T, o.B.T, alpha=_SCALING)

    def hybrid() -> Tensor:
        y = (o.x @ o.A.T) @ (_SCALING * o.B).T
        return y.addmm_(o.x, o.W.T)

    def augmented() -> Tensor:
        wide[:, :K].copy_(o.x)
        torch.mm(o.x, o.A.T, out=wide[:, K:])
        return wide @ both.T

    augmented()
    return {
        "composed": composed,
        "hybrid": hybrid,
        "augmented": augmented,
        "augmented, input there": lambda: wide @ both.T,
    }


def grad_input_ways(o: Operands) -> dict[str, Step]:
    """dX [M, K] by calls of PyTorch, for a given dS."""
    return {
        "composed": lambda: (o.dY @ o.W).addmm_(o.dS, o.A),
        "hybrid": lambda: (o.dS @ o.A).addmm_(o.dY, o.W),
    }


def _forward(day: Day, M: int, K: int, N: int) -> dict[str, Any]:
    o = Operands.random(day, M, K, N)

    def fused(config: launch_policy.GemmConfig) -> object:
        return ticketed_gemm.forward(o.x, o.W, o.A, o.B, _SCALING, config=config)

    ways = {"cuBLAS": lambda: F.linear(o.x, o.W), **forward_ways(o)}
    makers = {**_ready(ways), **_routes(day, o), **_tiles(day, M, N, fused)}
    return {**_row(day, makers, M, K, N), "direction": "forward", **_picked(day, M)}


def _routes(day: Day, o: Operands) -> _Makers:
    """The library's own other routes: hybrid, and augmented where W is NF4."""
    if day.fused == "torch":
        return {}
    ops = TritonBackend(cublas=True)
    fs = [Factors(o.W, A=o.A, B=o.B, constants=Constants(_SCALING))]
    needs = [Needs(x=True, A=True, B=True)]
    found: _Makers = {"lora_fast hybrid": lambda: lambda: ops.forward(o.x, fs, needs, HYBRID)}
    if absent.is_there("bitsandbytes"):
        fs4 = [fs[0]._replace(weight=NF4Weight.from_dense(o.W))]
        found["lora_fast augmented, NF4"] = lambda: lambda: ops.forward(o.x, fs4, needs, AUGMENTED)
    return found


def _picked(day: Day, M: int) -> dict[str, Any]:
    """The name of the tile that is picked, whose times are those of lora_fast."""
    if day.fused == "torch":
        return {}
    return {"tile": tile_name(launch_policy.pick_gemm(M, _DTYPE, day.arch, R=_RANK))}


def _grad_input(day: Day, M: int, K: int, N: int) -> dict[str, Any]:
    """Strips, which come before, are measured separately: here the parts of dS are given."""
    o = Operands.random(day, M, K, N)
    parts = None if day.fused == "torch" else _parts(o)[1]

    def fused(config: launch_policy.GemmConfig) -> object:
        layer = ticketed_gemm.Layer(o.dY, o.W, o.A, o.B, _SCALING, parts)
        return ticketed_gemm.grad_input([layer], config=config)

    ways = {"cuBLAS": lambda: o.dY @ o.W, **grad_input_ways(o)}
    row = _row(day, {**_ready(ways), **_tiles(day, M, K, fused)}, M, K, N)
    return {**row, "direction": "dX", **_picked(day, M)}


def _ready(ways: dict[str, Step]) -> _Makers:
    return {name: lambda step=step: step for name, step in ways.items()}  # type: ignore[misc]


def _row(day: Day, makers: _Makers, M: int, K: int, N: int) -> dict[str, Any]:
    row = contest(day, makers, baseline="cuBLAS")
    work = {"flops": 2 * M * N * K, "bytes": None}
    return {**row, "M": M, "K": K, "N": N, "work": work, "summary": f"e: {_said(row, _e)}"}


def _tiles(day: Day, M: int, N: int, run: Callable[[launch_policy.GemmConfig], object]) -> _Makers:
    """Our launch by tile: the one that is picked, those the tuner may try, and variants."""
    if day.fused == "torch":
        return {}
    picked = launch_policy.pick_gemm(M, _DTYPE, day.arch, R=_RANK)
    wide = replace(picked, BLOCK_N=2 * picked.BLOCK_N, num_warps=8, num_stages=3)
    others = (
        *launch_policy.other_gemms(M, N, _DTYPE, day.arch),
        *(wide, replace(wide, num_stages=4), replace(wide, descriptors=False)),
        *(replace(picked, GROUP_M=2 * picked.GROUP_M), replace(picked, descriptors=False)),
    )
    tiles = {"lora_fast": picked, **{tile_name(c): c for c in others if c != picked}}
    return {name: _only(config, run) for name, config in tiles.items()}


def _only(
    config: launch_policy.GemmConfig, run: Callable[[launch_policy.GemmConfig], object]
) -> Callable[[], Step]:
    """A tile that does not fit is left out, so that no smaller one is timed under its name."""

    def make() -> Step:
        with mock.patch.object(out_of_resources, "smaller", lambda config: None):
            run(config)
        return lambda: run(config)

    return make


def _parts(o: Operands) -> tuple[dict[str, Tensor], Tensor]:
    """dB and the parts of dS, in one read of dY."""
    found: tuple[dict[str, Tensor], Tensor] = strips.grad_expand(
        o.dY, o.B, _SCALING, wanted=strips.Wanted(B=True), S=o.S, stores_dS=True
    )
    return found


def _strips(day: Day, M: int, K: int, N: int) -> dict[str, Any]:
    """dB and dS from dY, dA from x: by PyTorch in three products, by ours in two launches."""
    o = Operands.random(day, M, K, N)

    def products() -> object:
        return o.dY.T @ o.S, o.dY @ o.B, o.dS.T @ o.x

    def ours(ctas: int) -> Callable[[], Step]:
        def step() -> object:
            with mock.patch.object(launch_policy, "strip_ctas", lambda arch: ctas):
                return _parts(o), strips.grad_shrink(o.x, Shrunk(o.dS), _DTYPE)

        return lambda: step

    makers: _Makers = {"products": lambda: products}
    if day.fused != "torch":
        # The first is what the library launches.
        shipped = launch_policy.strip_ctas(day.arch)
        makers |= {"lora_fast": ours(shipped)}
        others = (c for c in _STRIP_CTAS if c != shipped)
        makers |= {f"{ctas} CTAs": ours(ctas) for ctas in others}
    row = contest(day, makers, baseline="products")
    work = {"flops": None, "bytes": 2 * M * (N + K)}

    def rate(times: dict[str, Any]) -> str:
        return f"{work['bytes'] / times['seconds']['median'] / 1e12:.2f}"

    return {**row, "M": M, "K": K, "N": N, "work": work, "summary": f"TB/s: {_said(row, rate)}"}


def _said(row: dict[str, Any], number: Callable[[dict[str, Any]], str]) -> str:
    """A number for each contestant that ran; the report lists the others."""
    times = {name: best(found) for name, found in row["contestants"].items()}
    return ", ".join(f"{name} {number(t)}" for name, t in times.items() if t is not None)


def _e(times: dict[str, Any]) -> str:
    return f"{1 / times['over_baseline']['median']:.3f}"


def _host(day: Day) -> dict[str, Any]:
    """Host time to enqueue a forward and a backward pass of one small layer."""
    steps: dict[str, Step] = {"PyTorch, written out": _written_out(day)}
    backends = ("torch",) if day.fused == "torch" else ("triton", "auto")
    steps |= {f"lora_fast, {backend}": _functional(day, backend) for backend in backends}
    if absent.is_there("peft"):
        steps |= _peft_layers(day)
    rounds, calls = (1, 1) if day.rehearsal else (_HOST_ROUNDS, _HOST_CALLS)
    for step in steps.values():
        for _ in range(day.warm_up_calls):
            step()
    torch.cuda.synchronize(day.device)
    timer = _standing_still if day.rehearsal else _enqueued(day)
    timings = interleaved(steps, dict.fromkeys(steps, calls), rounds=rounds, timer=timer)
    found = {name: timings.median(name) for name in steps}
    said = ", ".join(f"{name} {seconds * 1e6:.0f}" for name, seconds in found.items())
    return {"host_seconds": found, "summary": f"µs to enqueue: {said}"}


def _enqueued(day: Day) -> Callable[[Step, int], float]:
    """Time of the calls alone: the device is idle before, and nothing waits for it."""

    def time_calls(step: Step, calls: int) -> float:
        torch.cuda.synchronize(day.device)
        started = time.perf_counter()
        for _ in range(calls):
            step()
        return time.perf_counter() - started

    return time_calls


def _standing_still(step: Step, calls: int) -> float:
    """Run the steps of a rehearsal, whose times mean nothing."""
    step()
    return calls * 1e-3


def _small(day: Day) -> Operands:
    M, width = (8, 64) if day.rehearsal else _SMALL
    return Operands.random(day, M, width, width)


def _written_out(day: Day) -> Step:
    o = _small(day)
    wanted = [t.requires_grad_() for t in (o.x, o.A, o.B)]

    def step() -> object:
        y = F.linear(o.x, o.W) + _SCALING * F.linear(F.linear(o.x, o.A), o.B)
        return torch.autograd.grad(y, wanted, o.dY)

    return step


def _functional(day: Day, backend: Any) -> Step:
    o = _small(day)
    wanted = [t.requires_grad_() for t in (o.x, o.A, o.B)]

    def step() -> object:
        with lora_fast.set_backend(backend):
            y = lora_fast.functional.adapted_linear(o.x, o.W, A=o.A, B=o.B, scaling=_SCALING)
            return torch.autograd.grad(y, wanted, o.dY)

    return step


def _peft_layers(day: Day) -> dict[str, Step]:
    """A PEFT layer, stock and accelerated."""
    from bench.linear_cases import Case, build, fused_calls

    M, width = (8, 64) if day.rehearsal else _SMALL
    layers = build(Case(M, width, width, _RANK, _DTYPE, "dense", 0.0, _DTYPE), day.device)
    ours = layers["lora_fast"]
    ours.forward_backward()
    if fused_calls(ours) != 1:
        raise RuntimeError("the fused path did not run")
    return {"PEFT": layers["peft"].forward_backward, "lora_fast, PEFT": ours.forward_backward}
