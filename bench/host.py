"""Host time of a training step: adapted layers over stock PEFT's, with a GPU that takes no time.

python -m bench.host [--rounds 201] [--json FILE]

The Triton backend runs as on a GPU, up to a launcher that does nothing (stub_driver.py), and its
step costs Python, PyTorch's dispatch and autograd. PEFT's step runs on the CPU in float32, on a
layer of 16 columns, whose arithmetic takes no time either. What NF4 decodes is a ready tensor on
both sides. One thread; CPU time, in interleaved rounds. Blocks of experts: host_experts.py.

A step is forward and backward, to x, A and B; of checkpointed layers, as a usual QLoRA run has
them, the forward pass runs twice on both sides. What a GPU adds to each launch on both sides, the
driver's call, is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fast

from . import host_experts
from .instruments import stub_driver
from .instruments.launchless import Launchless
from .instruments.paired import Ratio, Step, measure
from .linear_cases import linear4bit

ROWS, WIDTH, RANK, ARCH = 65, 16, 8, 90
BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
# Alternations of a few calls each: what else runs on the machine then slows both sides.
ROUNDS, SAMPLE_SECONDS = 201, 0.001


@dataclass(frozen=True)
class Case:
    """One layer ("linear"), or three that read the same x ("qkv"), by a route."""

    layers: str
    dropout_p: float
    weight: str
    route: str
    dtype: torch.dtype
    checkpointed: bool = False

    @property
    def aim(self) -> float:
        """The ratio that is aimed at."""
        if self.checkpointed:
            return 1.0
        return 1.0 if self.layers == "linear" and self.route != "fused" else 0.85

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        checkpointed = " checkpointed" if self.checkpointed else ""
        return f"{self.layers} p{self.dropout_p:g} {self.weight} {self.route} {dtype}{checkpointed}"


def cases() -> list[Case]:
    """cuBLAS's routes in float32 only: a CPU multiplies few 16-bit numbers in tens of µs."""
    routes = {
        "dense": [("fused", BF16), ("fused", FP32), ("hybrid", FP32)],
        "nf4": [("fused", BF16), ("fused", FP32), ("hybrid", FP32), ("augmented", FP32)],
    }
    steps = [(layers, p) for layers in ("linear", "qkv") for p in (0.0, 0.1)]
    found = [
        Case(layers, p, weight, route, dtype)
        for layers, p in steps
        for weight, known in routes.items()
        for route, dtype in known
    ]
    # The route that NF4 takes until a tuner has timed others.
    return found + [Case(*step, "nf4", "augmented", FP32, checkpointed=True) for step in steps]


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
    dY, *others = (torch.randn(ROWS, WIDTH, dtype=dtype) for _ in "qkv")
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    called = parent.q if case.layers == "linear" else parent
    dYs = dY if case.layers == "linear" else (dY, *others)

    def step() -> object:
        return torch.autograd.grad(called(x), wanted, dYs)

    def checkpointed() -> object:
        return torch.autograd.grad(checkpoint(called, x, use_reentrant=False), wanted, dYs)

    return checkpointed if case.checkpointed else step


@contextlib.contextmanager
def launching_nothing(route: str) -> Iterator[None]:
    """The Triton backend by `route`, as if the tuner had chosen it, with ready decoded weights."""
    from lora_fast.kernels import launch_plans, nf4_decode

    from lora_fast.backends import triton_ops, triton_plans
    from lora_fast.operation import autograd
    from lora_fast.tuning.plans import Plan

    backend = triton_plans.PlannedTritonBackend(cublas=True)
    ready = {dtype: torch.zeros(WIDTH, WIDTH, dtype=dtype) for dtype in (BF16, FP32)}
    beside = {columns: torch.zeros(WIDTH, WIDTH + columns) for columns in range(0, 97, 8)}

    def plan(self: Any, op: str, *asked: Any) -> Plan:
        forward = op.startswith("forward")
        return Plan(route=route if forward or route != "augmented" else "hybrid")  # type: ignore[arg-type]

    def decode(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
        return launch_plans.called(ready.__getitem__, dtype)

    def augmented(*operands: Any, columns: int, **options: Any) -> Tensor:
        return launch_plans.called(beside.__getitem__, columns)

    triton_plans.forget()
    with (
        stub_driver.standing_in(Launchless(ARCH)),
        mock.patch.object(autograd, "backend_for", lambda device: backend),
        mock.patch.object(triton_ops.TritonBackend, "_plan", plan),
        mock.patch.object(nf4_decode, "decode", decode),
        mock.patch.object(nf4_decode, "augmented", augmented),
    ):
        yield
    triton_plans.forget()


@contextlib.contextmanager
def decoding_nothing() -> Iterator[None]:
    """bitsandbytes with ready products and decoded weights."""
    y, W = torch.zeros(ROWS, WIDTH), torch.zeros(WIDTH, WIDTH)
    product = torch.ops.bitsandbytes.gemm_4bit
    with (
        mock.patch.object(bnb.functional, "dequantize_4bit", lambda *args, **kwargs: W),
        mock.patch.object(product, "default", lambda *args, **kwargs: y.detach()),
    ):
        yield


def compare(case: Case, rounds: int = ROUNDS) -> Ratio:
    """The time of a step of ours over that of stock PEFT's."""
    stock = model_of(case, FP32)
    ours = lora_fast.accelerate(model_of(case, case.dtype))
    steps = {"peft": step_of(stock, case, FP32), "ours": step_of(ours, case, case.dtype)}
    with launching_nothing(case.route), decoding_nothing():
        timings = measure(steps, rounds=rounds, device=CPU, sample_seconds=SAMPLE_SECONDS)
    report = lora_fast.report(ours)
    if not report.fused_calls or not report.all_fused:
        raise RuntimeError(f"{case}: the fused path did not run, so nothing was measured")
    return timings.ratio("ours", "peft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    print(f"{'step':45} over PEFT (quartiles)  aim")
    for case in [*cases(), *host_experts.cases()]:
        if isinstance(case, Case):
            ratio = compare(case, options.rounds)
        else:
            ratio = host_experts.compare(case, options.rounds, SAMPLE_SECONDS)
        found[str(case)] = {**asdict(ratio), "aim": case.aim}
        print(f"{case!s:45} {ratio!s:22} {case.aim:.2f}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
