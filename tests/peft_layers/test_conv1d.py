"""GPT-2's Conv1D, whose weight is [K, N]: the operation reads it by its strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_models import K, N, accelerated_copy, counted, lora_config, lora_layers, quietly, run
from model_families import inputs, tiny_model
from opaque_bases import bytes_saved
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fast
from bench.instruments.accuracy import assert_all_accurate, assert_models_agree, orders
from lora_fast.base_layer.linear import weight_of


class WithConv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = Conv1D(N, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def model_of(dtype: torch.dtype, **options: Any) -> Any:
    torch.manual_seed(0)
    config = lora_config(fan_in_fan_out=True, **options)
    return get_peft_model(WithConv1D().to(dtype), config, autocast_adapter_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_stock(dtype: torch.dtype) -> None:
    stock, x = model_of(dtype), torch.randn(3, 40, K).to(dtype)
    fused = accelerated_copy(stock)
    actual, eager = run(fused, x), orders(lambda: run(stock, x))
    ref64 = run(model_of(dtype).double(), x.double())
    assert_all_accurate(actual, ref64, eager, compute_dtype=dtype)
    (line,) = lora_fast.report(fused).layers
    assert (line.fused, line.route, counted(fused)) == (True, "torch", (1, {}))
    base = lora_layers(fused)[0].base_layer
    assert weight_of(base).data_ptr() == base.weight.data_ptr()
    for model in (fused, stock):
        quietly(model.merge_adapter)
    torch.testing.assert_close(fused(x), stock(x))


def test_gpt2_runs_fused() -> None:
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], init_lora_weights=False)
    stock = quietly(get_peft_model, tiny_model("gpt2"), config)
    fused, results = accelerated_copy(stock), []
    for model in (fused, stock):
        found = model(**inputs())
        found.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append({"logits": found.logits.detach(), **grads})
    assert lora_fast.report(fused).all_fused and counted(fused)[0] == 8
    assert_models_agree(*results)
    assert lora_fast.warm_up(fused, tokens=16) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt2_saves_less(dtype: torch.dtype) -> None:
    """`pytest -s` prints it: with dropout M × K elements less for every adapted layer."""
    for p in (0.0, 0.1):
        config = LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], lora_dropout=p)
        stock = quietly(get_peft_model, tiny_model("gpt2").to(dtype), config).train()
        fused = accelerated_copy(stock)
        ours, theirs = (bytes_saved(m, lambda m=m: m(**inputs()).loss) for m in (fused, stock))
        M, layers = inputs()["input_ids"].numel(), lora_layers(stock)
        # The first layer's x has no gradient: PEFT saves drop(x) there and no mask.
        elements = sum(M * layer.in_features for layer in layers[1:])
        print(f"GPT-2, {dtype}, p = {p}: {ours} bytes, PEFT {theirs}")
        assert len(layers) == 8 and lora_fast.report(fused).all_fused
        assert ours <= theirs - (dtype.itemsize * elements if p else 0)
