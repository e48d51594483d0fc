"""PEFT's LoRA-FA optimizer on accelerated layers: A frozen, x not saved."""

from __future__ import annotations

import copy

import pytest
import torch
from lora_models import HIDDEN, K, Mlp, N, counted, peft_model
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import lora_fast

R, M = 3, 7


def _model() -> nn.Module:
    torch.manual_seed(0)
    return peft_model(model=Mlp(), r=R, lora_alpha=6)


def _train(model: nn.Module, steps: int) -> None:
    optimizer = create_lorafa_optimizer(model, r=R, lora_alpha=6, lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(M, K, generator=generator)
        (model(x) - torch.randn(M, N, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:`scaling_factor`")
def test_three_steps_are_those_of_stock_peft() -> None:
    stock = _model()
    fused, start = lora_fast.accelerate(copy.deepcopy(stock)), copy.deepcopy(stock)
    _train(stock, 3)
    _train(fused, 3)
    assert counted(fused) == (6, {})
    for (name, p), q, before in zip(
        fused.named_parameters(), stock.parameters(), start.parameters(), strict=True
    ):
        # The optimizer projects gradients in bfloat16, where last bits of float32 may tip a
        # rounding: one part in 2⁸ of three steps of 1e-2.
        torch.testing.assert_close(p, q, rtol=0, atol=2**-8 * 3e-2, msg=name)
        assert torch.equal(q, before) is ("lora_B" not in name), name


def _saved(model: nn.Module, M: int) -> list[tuple[int, ...]]:
    """Shapes of what the forward pass saves, except parameters."""
    parameters = {p.data_ptr() for p in model.parameters()}
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            shapes.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(M, K))
    return shapes


def test_x_is_not_saved() -> None:
    model = lora_fast.accelerate(_model())
    with_A = _saved(model, M)
    create_lorafa_optimizer(model, r=R, lora_alpha=6, lr=1e-2)
    without = _saved(model, M)
    assert (M, K) in with_A and with_A.count((M, HIDDEN)) == 2  # x of fc2 and tanh's own result
    assert (M, K) not in without and without.count((M, HIDDEN)) == 1
    assert without.count((M, R)) == 2
