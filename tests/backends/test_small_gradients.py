"""Gradients of adapters on a 16-bit base, for losses of any scale: no further from float64 than
those of stock PEFT, whose adapters are float32 and get their gradients in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lora_models import (
    K,
    accelerated_copy,
    counted,
    float64_copy,
    lora_config,
    method_model,
    tuner_layers,
)
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fast
from bench.instruments.accuracy import assert_accurate, assert_all_accurate, assert_as_close, orders

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
METHODS = ["lora", "dora", "vera", "adalora", "ia3"]
# Factors of the loss: one, and those by which gradients shrink in a large batch.
SCALES = [1.0, 2.0**-10, 2.0**-20]


@pytest.fixture(autouse=True)
def _torch_backend():
    with lora_fast.set_backend("torch"):
        yield


def _gradients(model: Any, x: Tensor, dY: Tensor) -> dict[str, Tensor]:
    """y, dX and the gradients of the adapters for dY, which is in the dtype of the 16-bit model."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.backward(dY.to(y.dtype))
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **found}


def check(stock: Any, dtype: torch.dtype, scale: float) -> None:
    """The rule for `stock` accelerated; for a scaled loss of its adapters' gradients alone."""
    fused, wide = accelerated_copy(stock), float64_copy(stock)
    x = torch.randn(70, K).to(dtype)
    dY = (torch.randn(70, 20) * scale).to(dtype)
    actual, ref64 = _gradients(fused, x, dY), _gradients(wide, x.double(), dY)
    eager = orders(lambda: _gradients(stock, x, dY))
    assert counted(fused) == (1, {})
    for name, value in actual.items():
        if scale == 1.0 or name not in ("y", "x"):
            assert_accurate(value, ref64[name], eager[name], name=name, compute_dtype=dtype)


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, kind: str, dtype: torch.dtype, scale: float) -> None:
    check(method_model(method, kind, dtype, FP32, dtype), dtype, scale)


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_small_factors(size: float, scale: float) -> None:
    """After the first step B is about as large as the learning rate, with few digits in float16."""
    stock = method_model("lora", "dense", FP16, FP32)
    for layer in tuner_layers(stock):
        layer.lora_B["default"].weight.data.mul_(size)
    check(stock, FP16, scale)


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_columns_of_unlike_size(dtype: torch.dtype) -> None:
    """Adapters that are stacked share a product; each keeps gradients of its own size."""
    stock = method_model("lora", "dense", dtype, FP32, adapters=2)
    for layer in tuner_layers(stock):
        layer.lora_B["adapter1"].weight.data.mul_(1e-7)
    for scale in SCALES:
        check(stock, dtype, scale)


class Shared(nn.Module):
    """Layers that read the same x, under names that form a group."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(K, n) for n in (20, 8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_a_group_with_a_member_of_small_gradients(dtype: torch.dtype, scale: float) -> None:
    config = lora_config(target_modules=["q_proj", "k_proj", "v_proj"])
    stock = get_peft_model(Shared().to(dtype), config)
    stock.base_model.model.k_proj.lora_B["default"].weight.data.mul_(1e-6)
    fused, wide = accelerated_copy(stock), float64_copy(stock)
    x, dY = torch.randn(70, K).to(dtype), (torch.randn(70, 40) * scale).to(dtype)
    actual, ref64 = _gradients(fused, x, dY), _gradients(wide, x.double(), dY)
    eager = orders(lambda: _gradients(stock, x, dY))
    for found in (actual, ref64, eager) if scale < 1.0 else ():
        del found["y"], found["x"]
    assert_all_accurate(actual, ref64, eager, compute_dtype=dtype)
    assert counted(fused) == (3, {})


def _llama(dtype: torch.dtype) -> Any:
    """A small Llama of two layers, after two steps of AdamW as PEFT is used by default."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    model = get_peft_model(model, lora_config(r=8, target_modules="all-linear",
                                              init_lora_weights=True))  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    for _ in range(2):
        optimizer.zero_grad()
        _loss(model, 1.0).backward()
        optimizer.step()
    return model


def _loss(model: Any, scale: float) -> Tensor:
    ids = torch.randint(3, 60, (4, 64), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, labels=ids).loss * scale


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_a_model_after_its_first_steps(dtype: torch.dtype) -> None:
    """Through all layers, whose 16-bit dY is the error of stock PEFT and ours alike."""
    stock = _llama(dtype)
    fused, wide = lora_fast.accelerate(copy.deepcopy(stock)), copy.deepcopy(stock).double()

    def gradients(model: Any, scale: float) -> dict[str, Tensor]:
        model.zero_grad()
        _loss(model, scale).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    for scale in (1.0, 2.0**-6):
        actual, ref64 = gradients(fused, scale), gradients(wide, scale)
        eager = orders(lambda scale=scale: gradients(stock, scale))
        for name, value in actual.items():
            assert_as_close(value, ref64[name], eager[name], name=f"{name} of loss · {scale}")
    assert lora_fast.report(fused).all_fused
