"""Merging and unmerging the adapters of accelerated PEFT layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lora_models import (
    HAS_MICA,
    MICA,
    K,
    Mlp,
    accelerated_copy,
    lora_config,
    lora_layers,
    method_model,
    nf4_linear,
    peft_model,
    quietly,
)
from torch import Tensor, nn

import lora_fast
from bench.instruments.accuracy import assert_accurate

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def _weight(layer: Any) -> Tensor:
    weight = layer.base_layer.weight
    if hasattr(weight, "quant_state"):
        return lora_fast.NF4Weight.from_params4bit(weight).dequantize(F32)
    return weight.detach().clone()


def _with_two_adapters(kind: str, dtype: torch.dtype) -> Any:
    stock = peft_model(kind, dtype, F32, compute_dtype=dtype)
    torch.manual_seed(5)
    stock.add_adapter("other", lora_config(r=3, lora_alpha=9))
    stock.base_model.set_adapter(["default", "other"])
    return stock


def _exact(layer: Any, weight: Tensor) -> Tensor:
    delta = sum(
        layer.scaling[name]
        * layer.lora_B[name].weight.double()
        @ layer.lora_A[name].weight.double()
        for name in ("default", "other")
    )
    return weight.double() + delta


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_two_adapters_are_merged_and_rounded_once(dtype: torch.dtype) -> None:
    stock = _with_two_adapters("dense", dtype)
    fused = accelerated_copy(stock)
    (layer,), (plain,) = lora_layers(fused), lora_layers(stock)
    before = _weight(layer)
    for model in (stock, fused):
        quietly(model.merge_adapter)
    exact = _exact(plain, before).detach()
    assert_accurate(_weight(layer), exact, _weight(plain), name="W'")
    if dtype != F32:
        assert torch.equal(_weight(layer), exact.to(F32).to(dtype)), "nothing but one rounding"
    assert layer.merged_adapters == plain.merged_adapters == ["default", "other"]
    merged = _weight(layer)
    fused.unmerge_adapter()
    ulp = torch.finfo(dtype).eps * torch.maximum(before.abs(), merged.abs()).double()
    assert ((_weight(layer).double() - before.double()).abs() <= ulp).all()
    assert layer.merged_adapters == []


@pytest.mark.usefixtures("cpu_kind")
def test_nf4_is_quantised_again_and_given_back_exactly() -> None:
    fused = accelerated_copy(_with_two_adapters("nf4", F32))
    (layer,) = lora_layers(fused)
    before = _weight(layer)
    packed = layer.base_layer.weight.data.clone()
    fused.merge_adapter(["default"])
    fused.merge_adapter(["other"])
    assert not torch.equal(layer.base_layer.weight.data, packed)
    expected = nf4_linear(nn.Linear(K, 20), F32)
    expected.weight = type(expected.weight)(
        _exact(layer, before).float().detach(), requires_grad=False, quant_type="nf4"
    ).to("cpu")
    wanted = lora_fast.NF4Weight.from_params4bit(expected.weight).dequantize(F32)
    # Two merges quantise twice.
    assert (_weight(layer) - wanted).abs().max() <= 2 * 0.152 * wanted.abs().max()
    fused.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight.data, packed)
    assert torch.equal(_weight(layer), before)
    assert "_lora_fast_kept_weight" not in vars(layer)


@pytest.mark.usefixtures("cpu_kind")
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_the_merged_model_gives_what_the_unmerged_gave(kind: str) -> None:
    fused = accelerated_copy(peft_model(kind, model=Mlp())).eval()
    x = torch.randn(9, K)
    before = fused(x)
    merged = fused.merge_and_unload()
    error = (merged(x) - before).norm() / before.norm()
    assert error <= (1e-6 if kind == "dense" else 0.3)


def test_safe_merge_refuses_what_is_not_finite_and_the_other_does_not() -> None:
    for model in (peft_model(), accelerated_copy(peft_model())):
        lora_layers(model)[0].lora_B["default"].weight.data[0, 0] = float("nan")
        before = _weight(lora_layers(model)[0])
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            model.merge_adapter(safe_merge=True)
        assert torch.equal(_weight(lora_layers(model)[0]), before)
        model.merge_adapter()
        assert _weight(lora_layers(model)[0]).isnan().any()


@pytest.mark.parametrize("config", [{"lora_bias": True}, *([MICA] if HAS_MICA else [])], ids=str)
def test_what_is_not_plain_lora_is_merged_by_peft(config: dict[str, Any]) -> None:
    stock = peft_model(**config)
    fused = accelerated_copy(stock)
    for model in (stock, fused):
        quietly(model.merge_adapter)
    assert torch.equal(_weight(lora_layers(fused)[0]), _weight(lora_layers(stock)[0]))
    for model in (stock, fused):
        quietly(model.unmerge_adapter)
    assert torch.equal(_weight(lora_layers(fused)[0]), _weight(lora_layers(stock)[0]))


def test_dora_is_merged_by_peft() -> None:
    stock = method_model("dora")
    fused = accelerated_copy(stock)
    for model in (stock, fused):
        quietly(model.merge_adapter)
    assert torch.equal(_weight(lora_layers(fused)[0]), _weight(lora_layers(stock)[0]))


def test_merging_twice_and_unmerging_nothing_warn_as_stock_does() -> None:
    for model in (peft_model(), accelerated_copy(peft_model())):
        model.merge_adapter()
        before = _weight(lora_layers(model)[0])
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter()
        assert torch.equal(_weight(lora_layers(model)[0]), before)
        model.unmerge_adapter()
        with pytest.warns(UserWarning, match="Already unmerged"):
            model.unmerge_adapter()


def test_a_copy_of_a_merged_model_can_be_unmerged() -> None:
    fused = accelerated_copy(peft_model("nf4"))
    before = _weight(lora_layers(fused)[0])
    fused.merge_adapter()
    other = copy.deepcopy(fused)
    other.unmerge_adapter()
    assert torch.equal(_weight(lora_layers(other)[0]), before)
    assert not torch.equal(_weight(lora_layers(fused)[0]), before)
    stock = lora_fast.decelerate(fused)
    quietly(stock.unmerge_adapter)
    assert not lora_layers(stock)[0].merged


@pytest.mark.parametrize("method", ["lora", "dora", "lora_bias", "ia3", "vera"])
def test_a_backward_pass_after_a_merge_raises(method: str) -> None:
    """PEFT writes W through ``.data``, of which autograd knows nothing."""
    options = {"dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}}
    if method in ("ia3", "vera"):
        model = method_model(method)
    else:
        model = peft_model(**options.get(method, {}))
    fused = accelerated_copy(model)
    y = fused(torch.randn(7, K, requires_grad=True))
    fused.merge_adapter()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
