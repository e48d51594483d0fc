"""The Function of few rows on a CPU promises what that of many does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_models import K, accelerated_copy, lora_layers, peft_model
from torch import Tensor

from bench.instruments.accuracy import assert_same_bits
from lora_fast.backends.torch_few_rows import FEW_ROWS

BF16 = torch.bfloat16


def layer_and_input(M: int, **config: Any) -> tuple[Any, Tensor]:
    fused = accelerated_copy(peft_model(**config))
    return fused, torch.randn(M, K, requires_grad=True)


def trained(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("M", "taken"), [(1, True), (FEW_ROWS, True), (FEW_ROWS + 1, False)])
def test_it_is_taken(M: int, taken: bool, p: float) -> None:
    fused, x = layer_and_input(M, lora_dropout=p)
    y = fused(x)
    assert (type(y.grad_fn).__name__ == "FewRowsBackward") == taken
    with torch.no_grad():
        torch.manual_seed(3)
        first = fused(x)
    torch.manual_seed(3)
    assert_same_bits(first, fused(x).detach(), name="y")


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_a_parameter_that_is_replaced_before_backward(name: str) -> None:
    """Read as it was in the forward pass."""
    fused, x = layer_and_input(4)
    before = torch.autograd.grad(fused(x).sum(), [x, *trained(fused)])
    y = fused(x)
    weight = getattr(lora_layers(fused)[0], name)["default"].weight
    weight.data = torch.zeros_like(weight)
    for a, b in zip(torch.autograd.grad(y.sum(), [x, *trained(fused)]), before, strict=True):
        assert_same_bits(a, b, name=name)


def test_an_input_that_is_changed_in_place_before_backward() -> None:
    """An error, or with dropout, of which drop(x) is saved, without effect: as in stock PEFT."""
    for p in (0.0, 0.4):
        fused, x = layer_and_input(4, lora_dropout=p)
        gradients = []
        for changed in (False, True):
            torch.manual_seed(1)
            h = x * 1.0
            y = fused(h)
            if changed:
                h.mul_(3.0)
            if changed and p == 0.0:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    y.sum().backward()
            else:
                gradients.append(torch.autograd.grad(y.sum(), trained(fused)))
        for a, b in zip(gradients[0], gradients[-1], strict=True):
            assert_same_bits(a, b, name=f"p {p}")


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_backward_passes_in_every_mode(p: float) -> None:
    """Twice, with a graph, under autocast and of a batch of dYs: the same bits; and a derivative of
    a gradient raises."""
    fused, x = layer_and_input(4, lora_dropout=p)
    inputs = [x, *trained(fused)]
    y = fused(x)
    dY = torch.randn_like(y)
    first = torch.autograd.grad(y, inputs, dY, retain_graph=True)
    with torch.autocast("cpu", BF16):
        autocast = torch.autograd.grad(y, inputs, dY, retain_graph=True)
    batched = torch.autograd.grad(
        y, inputs, torch.stack([dY, dY]), retain_graph=True, is_grads_batched=True
    )
    for i, expected in enumerate(first):
        for other in (autocast[i], batched[i][0], batched[i][1]):
            assert_same_bits(other, expected, name=str(i))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y, inputs, dY, create_graph=True)[0].sum().backward()


def test_forward_under_autocast_rounds_once() -> None:
    fused, x = layer_and_input(4)
    with torch.autocast("cpu", BF16):
        y = fused(x)
    assert y.dtype is BF16
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype is torch.float32
