"""DoRA equals stock's after W, A, B, m or s changed between two calls, in every possible way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lora_models import K, Mlp, Single, accelerated_copy, counted, lora_layers, peft_model, quietly
from torch import Tensor, nn

import lora_fast


def _tensors(layer: Any) -> list[Tensor]:
    names = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [layer.base_layer.weight, *names]


def _noise(t: Tensor) -> Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(5))


def _through_data(layer: Any) -> None:
    for t in _tensors(layer):
        t.data += _noise(t)


def _folded(layer: Any) -> None:
    """As ReLoRA does: Δ is merged into W, and the adapter starts again."""
    layer.base_layer.weight.data += layer.get_delta_weight("default")
    nn.init.zeros_(layer.lora_B["default"].weight)


def _copied(layer: Any) -> None:
    with torch.no_grad():
        for t in _tensors(layer):
            t.copy_(_noise(t))


def _other_memory(layer: Any) -> None:
    for t in _tensors(layer):
        t.data = _noise(t)


def _through_numpy(layer: Any) -> None:
    for t in _tensors(layer):
        t.detach().numpy()[:] += _noise(t).numpy()


def _memory_of_a_storage(layer: Any) -> None:
    """As sharding frees and refills a parameter: the same tensor, emptied and filled again."""
    for t in _tensors(layer):
        size, content = t.untyped_storage().size(), _noise(t)
        t.untyped_storage().resize_(0)
        t.untyped_storage().resize_(size)
        t.data.copy_(content)


def _optimized(layer: Any) -> None:
    for foreach in (True, False):
        for t in _tensors(layer):
            t.requires_grad_().grad = _noise(t)
        torch.optim.AdamW(_tensors(layer), lr=0.3, foreach=foreach).step()
    layer.base_layer.weight.requires_grad_(False)


def _loaded(layer: Any) -> None:
    state = {name: _noise(t) for name, t in layer.state_dict().items()}
    layer.load_state_dict(state)


def _assigned(layer: Any) -> None:
    state = {name: _noise(t) for name, t in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    for t in _tensors(layer):
        t.requires_grad_(t is not layer.base_layer.weight)


def _scaled(layer: Any) -> None:
    layer.scaling["default"] *= 3.0


def _hot_swapped(layer: Any) -> None:
    """Another rank, in modules of the same names."""
    A, B = nn.Linear(layer.in_features, 9, bias=False), nn.Linear(9, layer.out_features, bias=False)
    for linear in (A, B):
        linear.weight.data = _noise(linear.weight)
    layer.lora_A["default"], layer.lora_B["default"] = A, B


def _merged_and_unmerged(layer: Any) -> None:
    quietly(layer.merge)
    layer.base_layer.weight.data += _noise(layer.base_layer.weight)
    quietly(layer.unmerge)


CHANGES = [
    _through_data, _folded, _copied, _other_memory, _through_numpy, _memory_of_a_storage,
    _optimized, _loaded, _assigned, _scaled, _hot_swapped, _merged_and_unmerged,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_peft_layers(change: Callable[[Any], None], training: bool) -> None:
    stock = peft_model(model=Mlp(), use_dora=True).train(training)
    fused, x = accelerated_copy(stock), torch.randn(5, K)
    results = []
    for model in (stock, fused):
        with torch.set_grad_enabled(training):
            before = model(x).detach().clone()
        for layer in lora_layers(model):
            change(layer)
        with torch.set_grad_enabled(training):
            results.append(model(x).detach())
        # Merging an adapter into its weight changes only the norms.
        assert change is _folded or not torch.allclose(results[-1], before)
    torch.testing.assert_close(*results)
    assert counted(fused) == (4, {})


@pytest.mark.parametrize("change", [_through_data, _other_memory, _memory_of_a_storage])
def test_modules_without_peft(change: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    layer = lora_fast.DoRALinear.from_linear(nn.Linear(K, 20), r=4)
    tensors = [layer.base_layer.weight, layer.lora_A, layer.lora_B]
    layer(torch.randn(3, K))

    class Named:
        base_layer = layer.base_layer
        lora_A = {"default": type("A", (), {"weight": layer.lora_A})}  # noqa: RUF012
        lora_B = {"default": type("B", (), {"weight": layer.lora_B})}  # noqa: RUF012

    change(Named)
    W, A, B = (t.detach().double() for t in tensors)
    norms = torch.linalg.vector_norm(W + layer.scaling * (B @ A), dim=1)
    torch.testing.assert_close(layer.gain().double(), layer.lora_magnitude_vector.double() / norms)


def test_nothing_is_kept_between_calls() -> None:
    fused = accelerated_copy(peft_model(model=Single(), use_dora=True))
    layer = lora_layers(fused)[0]
    before = {name: id(value) for name, value in vars(layer).items()}
    fused(torch.randn(3, K))
    assert {name: id(value) for name, value in vars(layer).items()} == before
    assert copy.deepcopy(layer).state_dict().keys() == layer.state_dict().keys()
