"""A derivative of a fused layer's gradients is refused, whatever it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_models import accelerated_copy, peft_model
from torch import Tensor, nn


class Block(nn.Module):
    """A path around the layers, along which a derivative exists."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * x + self.down(torch.tanh(self.up(x)))


def _penalty(model: Any, x: Tensor, first: str) -> tuple[Tensor, list[Tensor]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    of = [x] if first == "x" else trained
    grads = torch.autograd.grad(model(x).square().sum(), of, create_graph=True)
    return torch.stack([grad.square().sum() for grad in grads]).sum(), trained


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}], ids=["", "dropout"])
@pytest.mark.parametrize("asked", ["x", "parameters", "all", "inputs"])
@pytest.mark.parametrize("first", ["x", "parameters"])
def test_it_raises(first: str, asked: str, options: dict[str, Any]) -> None:
    targets = ["up", "down"]
    stock = peft_model(model=Block(), target_modules=targets, **options)
    model, x = accelerated_copy(stock), torch.randn(8, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="lora_fast has no second derivative"):
        loss, trained = _penalty(model, x, first)
        if asked == "all":
            loss.backward()
        elif asked == "inputs":
            loss.backward(inputs=trained)
        else:
            torch.autograd.grad(loss, x if asked == "x" else trained)


def test_the_gradients_are_those_without_a_graph() -> None:
    model = accelerated_copy(peft_model(model=Block(), target_modules=["up", "down"]))
    x = torch.randn(8, 16, requires_grad=True)
    plain, kept = (
        torch.autograd.grad(model(x).square().sum(), x, create_graph=graph)[0]
        for graph in (False, True)
    )
    assert torch.equal(plain, kept) and kept.requires_grad
