"""Host time of a step of a block of experts, over stock PEFT's, for ``python -m bench.host``.

8 experts of width 64, of which each of 16 tokens takes 2; forward and backward, to x, the routing
weights and all A and B. PEFT wraps the block around transformers' grouped_mm. Grouped products are
ready tensors on both sides where each is a launch (ours in bfloat16; in float32 it is a kernel with
the low rank in it), and so is what NF4 decodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import lora_fast

from .expert_blocks import Block, build, check_fused, step_of
from .instruments import stub_driver
from .instruments.launchless import Launchless
from .instruments.paired import Ratio, Step, measure

BLOCK, TOKENS, ARCH = Block("8 experts", 8, 2, 64, 64), 16, 90
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class ExpertCase:
    """A block of experts by the kind of its weights, and whether its gate is code of its module,
    which kernels do not know."""

    weight: str
    dtype: torch.dtype
    own_gate: bool = False
    aim = 0.85

    def __str__(self) -> str:
        gate = " own gate" if self.own_gate else ""
        return f"experts{gate} p0 {self.weight} {str(self.dtype).removeprefix('torch.')}"


def cases() -> list[ExpertCase]:
    plain = [ExpertCase(weight, dtype) for weight in ("dense", "nf4") for dtype in (BF16, FP32)]
    return [*plain, ExpertCase("dense", FP32, own_gate=True)]


def models_of(case: ExpertCase) -> dict[str, Any]:
    """Stock PEFT's block in float32, and ours in the dtype of the case, in training."""
    quantised = case.weight == "nf4"
    models: dict[str, Any] = {
        "peft": build(BLOCK, FP32, quantised=quantised)["peft"].train(),
        "ours": build(BLOCK, case.dtype, quantised=quantised)["lora_fast"].train(),
    }
    for model in models.values() if case.own_gate else ():
        # As somebody who replaces it in one module.
        module = model.get_base_layer()
        module._apply_gate = module._apply_gate
    return models


def step(experts: nn.Module, dtype: torch.dtype) -> Step:
    """Forward and backward of a block of :func:`models_of`."""
    forward, (x, _, w) = step_of(experts, BLOCK, TOKENS, dtype)
    dY = torch.randn(TOKENS, BLOCK.H, dtype=dtype)
    wanted = [x, w, *(p for p in experts.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(forward(), wanted, dY)


class _Ready:
    """Tensors that are there whenever a launch would make them."""

    def __init__(self) -> None:
        self._made: dict[Any, Tensor] = {}

    def __call__(self, *shape: int, dtype: torch.dtype) -> Tensor:
        if (shape, dtype) not in self._made:
            self._made[shape, dtype] = torch.zeros(shape, dtype=dtype)
        return self._made[shape, dtype]


class _ReadyProduct(torch.autograd.Function):
    """torch's grouped product of PEFT's side, without its arithmetic."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(rows, W)
        return rows.new_empty(rows.shape[0], W.shape[2])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """The Triton backend with a launcher that does nothing, and ready products and decoded weights
    on both sides."""
    from lora_fast.kernels import launch_plans, nf4_decode

    from lora_fast.backends import triton_expert_products, triton_plans
    from lora_fast.experts.nf4_experts import NF4Experts

    ready = _Ready()

    def decode(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
        return launch_plans.called(ready, *state.shape, dtype=dtype)

    def beside(packed: Tensor, state: Any, dtype: torch.dtype, *B: Any, columns: int) -> Tensor:
        *rows, K = state.shape
        return launch_plans.called(ready, *rows, K + columns, dtype=dtype)

    def dequantize(weight: NF4Experts, dtype: torch.dtype | None = None) -> Tensor:
        return ready(*weight.shape, dtype=dtype or weight.dtype)

    def base_product_of(rows: Tensor, W: Tensor) -> Any:
        return _ready_product if triton_expert_products.is_one_launch(rows, W) else None

    def grouped_mm(rows: Tensor, W: Tensor, *, offs: Tensor) -> Any:
        return _ReadyProduct.apply(rows, W)

    triton_plans.forget()
    with (
        stub_driver.standing_in(Launchless(ARCH)),
        lora_fast.set_backend("triton"),
        mock.patch.object(triton_expert_products, "base_product_of", base_product_of),
        mock.patch.object(nf4_decode, "decode", decode),
        mock.patch.object(nf4_decode, "augmented", beside),
        mock.patch.object(NF4Experts, "dequantize", dequantize),
        mock.patch.object(torch.nn.functional, "grouped_mm", grouped_mm),
    ):
        yield
    triton_plans.forget()


def _ready_product(rows: Tensor, W: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], W.shape[1])


def compare(case: ExpertCase, rounds: int, sample_seconds: float) -> Ratio:
    """The time of a step of ours over that of stock PEFT's."""
    models = models_of(case)
    steps = {
        name: step(model, FP32 if name == "peft" else case.dtype) for name, model in models.items()
    }
    with launching_nothing():
        timings = measure(
            steps, rounds=rounds, device=torch.device("cpu"), sample_seconds=sample_seconds
        )
    check_fused(models["ours"])
    return timings.ratio("ours", "peft")
