"""The short way of a plain LoRA layer, and everything that may change between two of its calls."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lora_models import K, N, accelerated_copy, lora_layers, peft_model
from torch import Tensor, nn

from lora_fast.peft_layers.plain_lora import read_plain

Change = Callable[[Any], object]


def _weights(layer: Any) -> tuple[Any, Any]:
    return layer.lora_A["default"], layer.lora_B["default"]


def _replace_modules(layer: Any) -> None:
    torch.manual_seed(5)
    layer.lora_A["default"] = nn.Linear(K, 3, bias=False)
    layer.lora_B["default"] = nn.Linear(3, layer.out_features, bias=False)


def _plain_attribute(layer: Any) -> None:
    """As FSDP does."""
    A, _ = _weights(layer)
    values = A.weight.detach() * 2.0
    del A.weight
    A.weight = values.requires_grad_()


def _own_forward(layer: Any) -> None:
    A, _ = _weights(layer)
    A.forward = lambda x: nn.functional.linear(x, A.weight) * 2.0


def _set_data(layer: Any) -> None:
    A, _ = _weights(layer)
    A.weight.data = A.weight.data * 3.0


def _set_wider_data(layer: Any) -> None:
    A, B = _weights(layer)
    A.weight.data = torch.cat([A.weight.data, A.weight.data])
    B.weight.data = torch.cat([B.weight.data, B.weight.data], dim=1)


CHANGES: dict[str, Change] = {
    "nothing": lambda layer: None,
    "lora_A and lora_B replaced": _replace_modules,
    "weight as a plain attribute": _plain_attribute,
    "a hook on lora_A": lambda layer: _weights(layer)[0].register_forward_hook(
        lambda module, args, y: y * 2.0
    ),
    "a hook before lora_B": lambda layer: _weights(layer)[1].register_forward_pre_hook(
        lambda module, args: (args[0] * 2.0,)
    ),
    "a hook on the base layer": lambda layer: layer.base_layer.register_forward_hook(
        lambda module, args, y: y + 1.0
    ),
    "a hook before dropout": lambda layer: layer.lora_dropout["default"].register_forward_pre_hook(
        lambda module, args: (args[0] * 2.0,)
    ),
    "forward of lora_A replaced": _own_forward,
    "weight.data": _set_data,
    "weight.data of another rank": _set_wider_data,
    "weight in place": lambda layer: _weights(layer)[0].weight.data.mul_(2.0),
    "scaling": lambda layer: layer.scaling.update(default=0.25),
    "scaling as an integer": lambda layer: layer.scaling.update(default=3),
    "scaling as a tensor": lambda layer: layer.scaling.update(default=torch.tensor(0.25)),
    "adapters disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "no active adapter": lambda layer: layer.set_adapter([]),
    "an adapter that is not there": lambda layer: layer.__dict__.update(_active_adapter="other"),
    "frozen base that trains": lambda layer: layer.base_layer.requires_grad_(True),
    "frozen lora_A": lambda layer: _weights(layer)[0].requires_grad_(False),
    "p of a dropout that drops nothing": lambda layer: layer.lora_dropout.update(
        {"default": nn.Dropout(0.0)}
    ),
    "dropout of another class": lambda layer: layer.lora_dropout.update(
        {"default": nn.AlphaDropout(0.0)}
    ),
    "dropout that drops everything": lambda layer: layer.lora_dropout.update(
        {"default": nn.Dropout(1.0)}
    ),
    "bias of the base layer": lambda layer: nn.init.ones_(layer.base_layer.bias),
    "no bias": lambda layer: layer.base_layer.register_parameter("bias", None),
    "weight.data of the base layer": lambda layer: layer.base_layer.weight.data.mul_(2.0),
    "in float64": lambda layer: layer.double(),
}


def results(layer: Any, x: Tensor) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    y = layer(x)
    y.sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_calls_is_noticed(change: str) -> None:
    stock = peft_model(init_lora_weights=False)
    fused = accelerated_copy(stock)
    layers = lora_layers(stock)[0], lora_layers(fused)[0]
    x = torch.randn(7, layers[0].in_features)
    for _ in range(3):
        results(layers[1], x)
    assert read_plain(layers[1]) is not None
    for layer in layers:
        CHANGES[change](layer)
    x = x.double() if change == "in float64" else x
    expected, found = results(layers[0], x), results(layers[1], x)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other)


def test_a_copy_shares_nothing_with_the_layer() -> None:
    fused = accelerated_copy(peft_model(init_lora_weights=False))
    layer = lora_layers(fused)[0]
    x = torch.randn(7, layer.in_features)
    before = layer(x)
    copied = pickle.loads(pickle.dumps(layer))
    copied.lora_A["default"].weight.data.zero_()
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(copied(x), layer.base_layer(x))


def test_numbers_of_another_shape_are_refused_as_before() -> None:
    fused = accelerated_copy(peft_model())
    layer = lora_layers(fused)[0]
    layer(torch.randn(7, layer.in_features))
    with pytest.raises(RuntimeError):
        layer(torch.randn(7, N + K))
