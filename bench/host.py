"""Host time of a training step: an adapted layer over stock PEFT's, with a GPU that takes no time.

python -m bench.host [--rounds 41] [--json FILE]

The Triton backend runs as on a GPU, up to a launcher that does nothing (stub_driver.py), and its
step costs Python, PyTorch's dispatch and autograd. PEFT's step runs on the CPU in float32, on a
layer of 16 columns, whose arithmetic takes no time either. A decoded NF4 weight is a ready tensor on
both sides. One thread; CPU time, in interleaved rounds.

A step is forward and backward, to x, A and B. What a GPU adds to each launch on both sides, the
driver's call, is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_fast

from .instruments import stub_driver
from .instruments.paired import Ratio, Step, measure
from .linear_cases import linear4bit

ROWS, WIDTH, RANK, ARCH = 65, 16, 8, 90
ROUTES = ("fused", "hybrid")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One layer ("linear"), or three that read the same x ("qkv")."""

    layers: str
    dropout_p: float
    weight: str
    route: str
    dtype: torch.dtype = torch.bfloat16

    @property
    def limit(self) -> float:
        """The largest ratio to PEFT."""
        return 1.0 if self.layers == "linear" and self.route != "fused" else 0.85

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.layers} p{self.dropout_p:g} {self.weight} {self.route} {dtype}"


def cases() -> list[Case]:
    return [
        Case(layers, p, weight, route, dtype)
        for layers in ("linear", "qkv")
        for p in (0.0, 0.1)
        for weight in ("dense", "nf4")
        for route in ROUTES
        for dtype in (torch.bfloat16, torch.float32)
    ]


class _Parent(nn.Module):
    """Calls its linears with the same x."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in "qkv")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


def model_of(case: Case, dtype: torch.dtype) -> Any:
    """Stock PEFT's model of a case in `dtype`, in training."""
    torch.manual_seed(0)
    parent = _Parent(dtype)
    if case.weight == "nf4":
        for name, linear in list(parent.named_children()):
            setattr(parent, name, linear4bit(linear))
    targets = ["q", "k", "v"] if case.layers == "qkv" else ["q"]
    config = LoraConfig(r=RANK, lora_dropout=case.dropout_p, target_modules=targets)
    return get_peft_model(parent, config).train()


def step_of(model: Any, case: Case, dtype: torch.dtype) -> Step:
    """Forward and backward of a model of :func:`model_of`."""
    parent = model.get_base_model()
    x = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    dY = torch.randn(ROWS, WIDTH, dtype=dtype)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    layer = parent.q

    def linear() -> object:
        return torch.autograd.grad(layer(x), wanted, dY)

    def qkv() -> object:
        return torch.autograd.grad(parent(x), wanted, (dY, dY, dY))

    return linear if case.layers == "linear" else qkv


class _Launchless(stub_driver.StubDriver):
    """The stub driver, whose launches are not even recorded."""

    def __init__(self, arch: int) -> None:
        super().__init__(stub_driver.Log(stub_driver.target_of(arch)))
        self.launcher_cls = self._launcher

    @staticmethod
    def _launcher(source: Any, metadata: Any) -> Any:
        return _nothing


def _nothing(*arguments: Any) -> None:
    pass


@contextlib.contextmanager
def launching_nothing(route: str) -> Iterator[None]:
    """The Triton backend by `route`, as a choice that is known already; decoded weights are there."""
    from lora_fast.backends import triton_ops, triton_plans
    from lora_fast.kernels import nf4_decode
    from lora_fast.operation import autograd
    from lora_fast.tuning import cost_model, plans, tuner

    plan = {"fused": plans.FUSED, "hybrid": plans.HYBRID}[route]
    backend = triton_plans.PlannedTritonBackend(cublas=True)
    ready = {d: torch.zeros(WIDTH, WIDTH, dtype=d) for d in (torch.float32, torch.bfloat16)}
    with (
        stub_driver.standing_in(_Launchless(ARCH)),
        mock.patch.object(autograd, "backend_for", lambda device: backend),
        mock.patch.object(cost_model, "pick", lambda *asked: plan),
        mock.patch.object(triton_ops, "tuner", tuner.Tuner(times=False)),
        mock.patch.object(nf4_decode, "decode", lambda packed, state, dtype: ready[dtype]),
    ):
        yield


@contextlib.contextmanager
def decoded_by_nobody() -> Iterator[None]:
    """bitsandbytes, whose products and decoded weights are there."""
    y, W = torch.zeros(ROWS, WIDTH), torch.zeros(WIDTH, WIDTH)
    functions = bnb.functional
    product = torch.ops.bitsandbytes.gemm_4bit
    with (
        mock.patch.object(functions, "dequantize_4bit", lambda *args, **kwargs: W),
        mock.patch.object(product, "default", lambda *args, **kwargs: y.detach()),
    ):
        yield


def compare(case: Case, rounds: int) -> Ratio:
    """The time of a step of ours over that of stock PEFT's."""
    stock = model_of(case, torch.float32)
    ours = lora_fast.accelerate(model_of(case, case.dtype))
    steps = {"peft": step_of(stock, case, torch.float32), "ours": step_of(ours, case, case.dtype)}
    with launching_nothing(case.route), decoded_by_nobody():
        timings = measure(steps, rounds=rounds, device=CPU, sample_seconds=0.004)
    report = lora_fast.report(ours)
    if not report.fused_calls or not report.all_fused:
        raise RuntimeError(f"{case}: the fused path did not run, so nothing was measured")
    return timings.ratio("ours", "peft"), timings.median("ours"), timings.median("peft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", type=Path)
    parser.add_argument("-k", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()
    for case in cases():
        if options.k in str(case):
            ratio, a, b = compare(case, options.rounds)
            print(f"{case!s:40} {ratio}  {a*1e6:.0f} {b*1e6:.0f} limit {case.limit}", flush=True)


if __name__ == "__main__":
    main()
