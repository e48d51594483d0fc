"""Another tensor assigned to a parameter's ``.data`` between forward and backward: the gradients
are those of the forward pass, as with stock PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attentions
import expert_models
import gated_models
import pytest
import torch
from lora_models import K, accelerated_copy, lora_layers, peft_model
from opaque_bases import opaque_model
from torch import Tensor, nn

from lora_fast.operation.saved_leaves import as_they_are

Pair = tuple[nn.Module, nn.Module, Tensor]


def _copied(stock: nn.Module, width: int) -> Pair:
    return stock, accelerated_copy(stock), torch.randn(2, 5, width)


def _experts() -> Pair:
    return *expert_models.fused_blocks("qwen3_moe"), torch.randn(2, 3, 32)


MODELS: dict[str, Callable[[], Pair]] = {
    "layer": lambda: _copied(peft_model(), K),
    "NF4": lambda: _copied(peft_model("nf4"), K),
    "DoRA": lambda: _copied(peft_model(use_dora=True), K),
    "group": lambda: _copied(attentions.stock_model(), K),
    "MLP": lambda: _copied(gated_models.stock_model(), gated_models.H),
    "experts": _experts,
}
REPLACED: dict[str, Callable[[str, Tensor], bool]] = {
    "A": lambda name, _: "lora_A" in name,
    "B": lambda name, _: "lora_B" in name,
    "W": lambda name, p: "lora_" not in name and p.is_floating_point() and p.dim() > 1,
}


def _gradients(
    model: Any, x: Tensor, replaced: Callable[[str, Tensor], bool]
) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    trained = [p for _, p in model.named_parameters() if p.requires_grad]
    y = model(x)
    y = y[0] if isinstance(y, tuple) else y
    for name, p in model.named_parameters():
        if replaced(name, p):
            p.data = 1.5 * p.data
    return list(torch.autograd.grad(y.square().sum(), [x, *trained], allow_unused=True))


@pytest.mark.parametrize("which", REPLACED)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_forward_pass(name: str, which: str) -> None:
    stock, fused, x = MODELS[name]()
    results = [_gradients(model, x, REPLACED[which]) for model in (fused, stock)]
    torch.testing.assert_close(*results)
    assert all(layer._lora_fast_calls.fused for layer in _layers(fused))


@pytest.mark.parametrize("name", MODELS)
def test_so_are_those_of_an_x_whose_data_is_replaced(name: str) -> None:
    """Of a leaf, which autograd saves as it is found in backward. PEFT saves a view of it."""
    stock, fused, x = MODELS[name]()
    found = []
    for model in (fused, stock):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y = y[0] if isinstance(y, tuple) else y
        leaf.data = torch.ones_like(x)
        trained = [leaf, *(p for p in model.parameters() if p.requires_grad)]
        found.append(list(torch.autograd.grad(y.square().sum(), trained, allow_unused=True)))
    torch.testing.assert_close(*found)
    assert all(layer._lora_fast_calls.fused for layer in _layers(fused))


@pytest.mark.parametrize("name", MODELS)
def test_what_was_saved_may_be_changed_where_pytorch_allows_it(name: str) -> None:
    stock, fused, x = MODELS[name]()
    found = []
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        for model in (fused, stock):
            leaf = x.clone().requires_grad_()
            read = leaf * 1.0
            y = model(read)
            y = y[0] if isinstance(y, tuple) else y
            trained = [p for p in model.parameters() if p.requires_grad]
            with torch.no_grad():
                for t in (read, *trained):
                    t.mul_(2.0)
            loss = y.square().sum()
            found.append(list(torch.autograd.grad(loss, [leaf, *trained], allow_unused=True)))
    torch.testing.assert_close(*found)
    assert all(layer._lora_fast_calls.fused for layer in _layers(fused))


def test_a_base_that_computes_by_itself() -> None:
    stock = opaque_model("hooks")
    fused = accelerated_copy(stock)
    x = torch.randn(2, 5, K)
    results = [_gradients(model, x, REPLACED["B"]) for model in (fused, stock)]
    torch.testing.assert_close(*results)


def _layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if "_lora_fast_calls" in m.__dict__]


def test_weights_written_in_place_are_an_error() -> None:
    _, fused, x = MODELS["layer"]()
    y = fused(x)
    with torch.no_grad():
        lora_layers(fused)[0].lora_A["default"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_is_saved() -> None:
    leaf, unread = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    made = leaf * 2
    saved, nothing, none, same = as_they_are([leaf, unread, None, made], [1])
    assert nothing is none is None
    assert same is made
    assert saved is not None and not saved.requires_grad
    with torch.no_grad():
        leaf.mul_(3)
    assert saved.tolist() == [3.0, 3.0] and saved._version == leaf._version
    leaf.data = torch.zeros(2)
    assert saved.tolist() == [3.0, 3.0]
