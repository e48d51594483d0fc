"""PEFT's DeLoRA on the fused path: stock's numbers, with every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_models import (
    K,
    Mlp,
    Single,
    accelerated_copy,
    assert_equal_runs,
    compare,
    counted,
    quietly,
    run,
    tuner_layers,
)
from peft import DeloraConfig, get_peft_model

import lora_fast
from bench.instruments.accuracy import assert_all_accurate, orders
from lora_fast import reference
from lora_fast.backends.torch_ops import TORCH
from lora_fast.operation.seeds import draw_seed

FP32, BF16 = torch.float32, torch.bfloat16


def delora_model(dtype: torch.dtype = FP32, model: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    config = DeloraConfig(
        **{"r": 5, "target_modules": ["fc"], "delora_lambda": 4, "init_weights": False, **options}
    )
    base = (model or Single()).to(dtype)
    return get_peft_model(base, config, autocast_adapter_dtype=False).to(dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("init_weights", [True, False], ids=["B = 0", "B ≠ 0"])
def test_values_and_gradients(dtype: torch.dtype, init_weights: bool) -> None:
    """With B = 0 the clamp decides: a column of norm 0 has no slope."""
    stock = delora_model(dtype, init_weights=init_weights)
    fused = accelerated_copy(stock)
    compare(fused, stock, torch.randn(3, 7, K).to(dtype), compute_dtype=dtype)
    assert counted(fused) == (1, {})
    names = {name.split(".")[-2] for name, p in fused.named_parameters() if p.requires_grad}
    assert names == {"delora_A", "delora_B", "delora_lambda"}


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_under_autocast(dtype: torch.dtype) -> None:
    stock = delora_model()
    fused = accelerated_copy(stock)
    x = torch.randn(9, K).bfloat16().to(dtype)
    compare(fused, stock, x, compute_dtype=BF16, autocast=BF16)
    assert counted(fused) == (1, {})


def test_dropout() -> None:
    stock = delora_model(module_dropout=0.25).train()
    fused, x = accelerated_copy(stock), torch.randn(6, K)
    torch.manual_seed(3)
    keep = TORCH.dropout_mask(draw_seed(x.device), 6, K, 0.25, x.device) / 0.75
    dropout = _Masked(keep)
    wide = delora_model().double()
    wide.load_state_dict(stock.state_dict())
    for model in (stock, wide):
        tuner_layers(model)[0].delora_dropout["default"] = dropout
    torch.manual_seed(3)
    actual = run(fused, x)
    ref64 = run(wide, x.double())
    assert_all_accurate(actual, ref64, orders(lambda: run(stock, x)), compute_dtype=FP32)
    assert counted(fused) == (1, {})


class _Masked(torch.nn.Module):
    def __init__(self, keep: torch.Tensor) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.keep.to(x.dtype)


def test_several_adapters_and_what_falls_back() -> None:
    stock = delora_model()
    stock.add_adapter("other", DeloraConfig(r=3, target_modules=["fc"], init_weights=False))
    stock.base_model.set_adapter(["default", "other"])
    fused, x = accelerated_copy(stock), torch.randn(8, K)
    compare(fused, stock, x, compute_dtype=FP32)
    assert counted(fused) == (1, {})
    for model in (fused, stock):
        tuner_layers(model)[0].base_layer.register_forward_hook(lambda m, args, y: 2 * y)
    assert_equal_runs(run(fused, x), run(stock, x))
    assert counted(fused) == (1, {"hooks on base layer": 1})


def test_merging_and_later_adapters() -> None:
    stock = delora_model(model=Mlp(), target_modules=["fc1"])
    fused, x = accelerated_copy(stock), torch.randn(4, K)
    y = fused(x)
    quietly(fused.merge_adapter)
    torch.testing.assert_close(fused(x), y)
    quietly(fused.unmerge_adapter)
    fused.add_adapter("other", DeloraConfig(r=2, target_modules=["fc2"], init_weights=False))
    fused.base_model.set_adapter(["default", "other"])
    fused(x)
    assert [line.fused_calls for line in lora_fast.report(fused).layers] == [2, 1]
    assert fused.get_base_model().fc2.delora_A.keys() == {"other"}
    fused.delete_adapter("other")
    lora_fast.decelerate(fused)
    assert type(fused.base_model) is type(stock.base_model)
    assert type(fused.get_base_model().fc1) is type(stock.get_base_model().fc1)


def test_the_factors_are_those_of_the_equation() -> None:
    """The specification with A ⊙ w and d, in float64."""
    stock, x = delora_model().double(), torch.randn(5, K).double()
    (layer,) = tuner_layers(stock)
    A, B = layer.delora_A["default"], layer.delora_B["default"]
    norms = A.norm(dim=1) * B.norm(dim=0)
    w = layer.base_layer.weight.float().norm(dim=0).double()
    torch.testing.assert_close(layer.delora_w_norm["default"], w)
    y = reference.adapted_linear(
        x, layer.base_layer.weight, layer.base_layer.bias, A=A * w, B=B, d=4 / 5 / norms
    )
    torch.testing.assert_close(stock(x), y)
