"""Small adapted models and training steps for the tests of Delta-LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lora_models import K, Mlp, N, peft_model
from torch import Tensor, nn

import lora_fast
from bench.instruments.accuracy import assert_same_bits
from lora_fast import NF4Weight

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
C = 0.5


def ours(kind: str = "dense", dtype: torch.dtype = F32) -> nn.Module:
    torch.manual_seed(0)
    model = Mlp().to(dtype)
    quantize: Any = "nf4" if kind == "nf4" else None
    return lora_fast.convert(model, ["fc1", "fc2"], r=3, lora_alpha=6, quantize=quantize)


def peft(kind: str = "dense", dtype: torch.dtype = F32) -> nn.Module:
    torch.manual_seed(0)
    return peft_model(kind, dtype, model=Mlp(), r=3, lora_alpha=6)


def accelerated(kind: str = "dense", dtype: torch.dtype = F32) -> nn.Module:
    return lora_fast.accelerate(peft(kind, dtype))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "ours": ours,
    "peft": peft,
    "accelerated": accelerated,
}


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def weight_of(layer: Any) -> Tensor:
    """W in float64, decoded from NF4."""
    weight = layer.base_layer.weight
    if hasattr(weight, "quant_state"):
        return NF4Weight.from_params4bit(weight).dequantize(F64)
    return weight.detach().double()


def product_of(layer: Any) -> Tensor:
    """s B A in float64."""
    if isinstance(layer, lora_fast.LoRALinear):
        return layer.scaling * (layer.lora_B.detach().double() @ layer.lora_A.detach().double())
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.scaling["default"] * (B.detach().double() @ A.detach().double())


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    """One step on data of `seed`; returns the loss."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, K, generator=generator)
    target = torch.randn(6, N, generator=generator)
    dtype = layers_of(model)[0].base_layer.bias.dtype
    loss = (model(x.to(dtype)).float() - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def contents_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_same_model(actual: nn.Module, expected: nn.Module) -> None:
    left, right = contents_of(actual), contents_of(expected)
    assert left.keys() == right.keys()
    for name, value in right.items():
        assert_same_bits(left[name], value, name=name)
