"""Delta-LoRA: the weight follows the adapter, resumed runs equal uninterrupted ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from delta_runs import (
    BF16,
    F16,
    F32,
    F64,
    MODELS,
    C,
    adamw,
    assert_same_model,
    contents_of,
    layers_of,
    ours,
    peft,
    product_of,
    train_step,
    weight_of,
)
from lora_models import K, nf4_linear
from torch import nn

import lora_fast
from bench.delta_lora_rounding import update_of
from bench.instruments.accuracy import ORDER_DIFFERENCE, assert_agree, assert_same_bits
from lora_fast import NF4Weight
from lora_fast.optim import DeltaLoRA


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("start_step", [0, 2])
def test_the_weight_moves_by_the_papers_rule(kind: str, start_step: int) -> None:
    model = MODELS[kind]()
    optimizer = DeltaLoRA(adamw(model), model, c=C, start_step=start_step)
    for step in range(4):
        weights = [weight_of(layer) for layer in layers_of(model)]
        products = [product_of(layer) for layer in layers_of(model)]
        train_step(model, optimizer, step)
        for layer, W, BA in zip(layers_of(model), weights, products, strict=True):
            delta = weight_of(layer) - W
            expected = C * (product_of(layer) - BA)
            if step < start_step:
                assert (delta == 0).all()
            else:
                # One rounding of W, and of factors that are around 1, in float32.
                assert expected.abs().max() > 1e-4
                assert (delta - expected).abs().max() < 2**-23 * (1 + W.abs().max())


def test_everything_but_the_weight_is_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """With c = 0 the run is bitwise that of the wrapped optimizer."""
    wrapped, plain = ours(), ours()
    optimizer, other = DeltaLoRA(adamw(wrapped), wrapped, c=0.0), adamw(plain)
    for step in range(3):
        assert train_step(wrapped, optimizer, step) == train_step(plain, other, step)
    assert_same_model(wrapped, plain)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_16_bit_weights_are_one_rounding_away_at_any_time(dtype: torch.dtype) -> None:
    model = ours(dtype=dtype)
    optimizer = DeltaLoRA(adamw(model, lr=1e-3), model, c=C)
    start = [(weight_of(layer), product_of(layer)) for layer in layers_of(model)]
    for step in range(20):
        train_step(model, optimizer, step)
    for layer, (W, BA) in zip(layers_of(model), start, strict=True):
        exact = W + C * (product_of(layer) - BA)
        assert layer.base_layer.weight.dtype == dtype
        nearest = exact.to(F32).to(dtype).double()
        assert (weight_of(layer) == nearest).double().mean() > 0.999
        assert (nearest != W).double().mean() > 0.2


def test_in_place_16_bit_weights_lose_small_steps() -> None:
    """What the docstring says of keep_start=False."""
    arrived = {}
    for keep in (True, False):
        model = ours(dtype=BF16)
        optimizer = DeltaLoRA(adamw(model, lr=3e-4), model, c=C, keep_start=keep)
        layer = layers_of(model)[1]
        W, BA = weight_of(layer), product_of(layer)
        for step in range(30):
            train_step(model, optimizer, step)
        exact, got = C * (product_of(layer) - BA), weight_of(layer) - W
        arrived[keep] = float((got * exact).sum() / exact.square().sum())
    assert 0.9 < arrived[True] < 1.1, arrived
    assert arrived[False] < 0.5, arrived


def test_nf4_in_place_loses_all() -> None:
    arrived = {}
    for keep in (True, False):
        arrived[keep], _ = update_of("nf4", 1e-3, keep_start=keep, steps=40)
    assert 0.7 < arrived[True] < 1.1, arrived
    assert abs(arrived[False]) < 0.05, arrived


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_one_launch_a_weight(typical_executor: Any, dtype: torch.dtype) -> None:
    """The kernel, and what it makes of the weights, by the optimizer that uses it."""
    model = ours(dtype=dtype).to(typical_executor.device)
    optimizer = DeltaLoRA(adamw(model), model, c=C)
    before = [(weight_of(layer), product_of(layer)) for layer in layers_of(model)]
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with typical_executor.counting_launches() as names:
        optimizer.step()
    assert names == ["weight_update"] * 2
    for layer, (W, BA) in zip(layers_of(model), before, strict=True):
        exact = W + C * (product_of(layer) - BA)
        # One rounding to W's dtype, and float32 sums of W and of factors below 1.
        allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 2**-23 * (1 + W.abs().max())
        assert ((weight_of(layer) - exact).abs() <= allowed).all()
        assert (weight_of(layer) != W).any()


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_nf4_keeps_storage_and_format(kind: str, nested: bool) -> None:
    model = MODELS[kind]("nf4", BF16)
    if not nested:
        for layer in layers_of(model):
            linear = nn.Linear(
                layer.base_layer.in_features, layer.base_layer.out_features
            ).bfloat16()
            layer.base_layer = nf4_linear(linear, BF16, compress_statistics=False)
    layer = layers_of(model)[0]
    weight, state = layer.base_layer.weight, layer.base_layer.weight.quant_state
    pointer, W, BA = weight.data_ptr(), weight_of(layer), product_of(layer)
    optimizer = DeltaLoRA(adamw(model, lr=5e-2), model, c=C)
    for step in range(8):
        train_step(model, optimizer, step)
    assert layer.base_layer.weight is weight and weight.data_ptr() == pointer
    assert weight.quant_state is state and state.nested is nested and state.blocksize == 64
    exact = W + C * (product_of(layer) - BA)
    fresh = NF4Weight.from_dense(exact.float(), double_quant=nested)
    packed = NF4Weight.from_params4bit(weight).packed
    assert (packed == fresh.packed).double().mean() > 0.99
    # One quantisation away, not eight.
    once = (fresh.dequantize(F64) - exact).norm()
    assert (weight_of(layer) - exact).norm() <= 1.001 * once
    assert (weight_of(layer) != W).double().mean() > 0.1


def test_it_passes_for_the_optimizer_it_wraps() -> None:
    model = ours()
    inner = torch.optim.SGD(lora_fast.optim.loraplus_param_groups(model, 0.1, 4.0), momentum=0.9)
    optimizer = DeltaLoRA(inner, model, c=C)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train_step(model, optimizer, 0)
    scheduler.step()
    assert [g["lr"] for g in inner.param_groups] == [0.05, 0.2] and calls == ["before", "after"]
    assert optimizer.state is inner.state and len(optimizer.state) == 4
    assert all(p.grad is None for p in model.parameters())
    assert "lr: 0.05" in repr(optimizer)
    loss = optimizer.step(lambda: torch.tensor(3.0))
    assert loss == 3.0
    clone = copy.deepcopy((model, optimizer))
    before = contents_of(model)
    train_step(*clone, 1)
    assert clone[1].steps == 3 and optimizer.steps == 2
    for name, value in contents_of(model).items():
        assert_same_bits(value, before[name], name=name)
    assert clone[1].state_dict().keys() == optimizer.state_dict().keys()


def test_a_saved_tensor_is_not_overwritten_unnoticed() -> None:
    model = ours()
    optimizer = DeltaLoRA(adamw(model), model, c=C)
    x = torch.randn(4, K, requires_grad=True)
    y = model(x)
    train_step(model, optimizer, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_scalings_may_be_tensors() -> None:
    """As hot-swapped adapters of PEFT have them."""
    model, other = peft(), peft()
    for layer in layers_of(model):
        layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    for each in (model, other):
        optimizer = DeltaLoRA(adamw(each), each, c=C)
        for step in range(2):
            train_step(each, optimizer, step)
    for one, two in zip(layers_of(model), layers_of(other), strict=True):
        assert_agree(weight_of(one), weight_of(two), within=ORDER_DIFFERENCE)
