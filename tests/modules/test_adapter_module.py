"""Attributes of nn.Linear that every adapted module has, for code that expects them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from lora_models import K, N, nf4_linear
from torch import nn

from lora_fast import DoRALinear, LoRALinear, VeRALinear


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear, VeRALinear])
@pytest.mark.parametrize("quantized", [False, True])
def test_it_has_what_a_linear_layer_has(kind: Any, quantized: bool) -> None:
    linear = nn.Linear(K, N)
    base = nf4_linear(linear, torch.float32) if quantized else linear
    layer = kind.from_linear(base, r=4)
    for module in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (module.in_features, module.out_features) == (K, N)
        assert module.weight is module.base_layer.weight
        assert module.bias is module.base_layer.bias
        # Neither a parameter of its own nor a key: they belong to the base layer.
        assert {"weight", "bias"}.isdisjoint(dict(module.named_parameters()))
        assert {"weight", "bias"}.isdisjoint(module.state_dict())


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(N, K)), torch.zeros(N, K)])
def test_it_cannot_be_written_over(name: str, value: Any) -> None:
    layer = LoRALinear.from_linear(nn.Linear(K, N), r=4)
    before = getattr(layer, name)
    with pytest.raises(AttributeError, match=f"{name} must be set on base_layer"):
        setattr(layer, name, value)
    assert getattr(layer, name) is before


def test_no_bias_is_none() -> None:
    assert LoRALinear.from_linear(nn.Linear(K, N, bias=False), r=4).bias is None


def test_a_merged_layer_shows_the_merged_weight() -> None:
    layer = LoRALinear.from_linear(nf4_linear(nn.Linear(K, N), torch.float32), r=4)
    nn.init.normal_(layer.lora_B)
    layer.merge(dequantize=True)
    assert layer.weight is layer.base_layer.weight
    assert layer.weight.shape == (N, K)
