"""Layers whose base computes its output by itself: real ones, and stand-ins for classes whose
packages need a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from lora_models import K, N, Single, lora_config
from peft import get_peft_model
from peft.tuners import lora
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import Tensor, nn


class Packed(nn.Module):
    """A frozen layer with the attributes that GPTQ's, AWQ's and AQLM's have, and no weight: int8
    rows with a scale each, decoded in forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        W = linear.weight.detach()
        scales = W.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", (W / scales).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        W = self.qweight.to(x.dtype) * self.scales.to(x.dtype)
        return nn.functional.linear(x, W, None if self.bias is None else self.bias.to(x.dtype))


class LinearOfSomeoneElse(nn.Linear):
    """A subclass, whose forward may be anything."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def int8(linear: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def fp4(linear: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, quant_type="fp4", compute_dtype=linear.weight.dtype
    )
    made.load_state_dict(linear.state_dict())
    made.weight.data = linear.weight.detach().clone()
    assert linear.bias is not None
    made.bias = nn.Parameter(linear.bias.detach().clone())
    return made.to("cpu")


def subclass(linear: nn.Linear) -> nn.Module:
    linear.__class__ = LinearOfSomeoneElse
    return linear


def hooked(linear: nn.Linear) -> nn.Module:
    linear.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    linear.register_forward_hook(lambda module, args, y: y / 3)
    return linear


def replaced(linear: nn.Linear) -> nn.Module:
    forward = linear.forward
    linear.forward = lambda x: forward(x) + 1  # type: ignore[method-assign]
    return linear


# name: how the base is made of a linear layer, and the class of PEFT that wraps it, None if PEFT
# finds it by itself
KINDS: dict[str, tuple[Callable[[nn.Linear], nn.Module], type | None]] = {
    "int8": (int8, None),
    "fp4": (fp4, None),
    "gptq": (Packed, GPTQLoraLinear),
    "awq": (Packed, AwqLoraLinear),
    "aqlm": (Packed, AqlmLoraLinear),
    "subclass": (subclass, None),
    "hooks": (hooked, None),
    "forward": (replaced, None),
}


def opaque_model(
    kind: str,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    **config: Any,
) -> Any:
    """A stock PEFT model of one layer on an opaque base, with B ≠ 0."""
    torch.manual_seed(0)
    make, wrapper = KINDS[kind]
    model: Any = Single().to(dtype)
    model.fc = make(model.fc)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "int8", kind == "fp4"
    if wrapper is None:
        wrapped = get_peft_model(model, lora_config(**config), autocast_adapter_dtype=False)
    else:
        packed, model.fc = model.fc, nn.Linear(K, N)
        wrapped = get_peft_model(model, lora_config(**config), autocast_adapter_dtype=False)
        found: Any = wrapped.base_model.model
        layer = wrapper(packed, "default", config=lora_config(**config), r=5, lora_alpha=8)
        layer.load_state_dict(found.fc.state_dict(), strict=False)
        found.fc = layer
        assert isinstance(layer, lora.LoraLayer)
        packed.requires_grad_(False)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype or dtype)
    return wrapped.train()
