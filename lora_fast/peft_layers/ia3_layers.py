"""PEFT's (IA)³ layers: one trained gain on the outputs or, in feed-forward layers, the inputs.

    outputs  y = l ⊙ (x Wᵀ + bias) = l ⊙ (x Wᵀ) + l ⊙ bias
    inputs   y = (l ⊙ x) Wᵀ + bias

The gains of several active adapters are multiplied. Source: (IA)³ (Liu et al. 2022, §3.3).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import ia3
from torch import Tensor, nn

from ..base_layer.linear import adapted, weight_shape
from ..base_layer.obstacles import base_obstacle, call_obstacle, tensor_obstacle
from .four_bit_classes import IA3Linear4bit
from .fused_forward import FusedForward, switched_off


class FusedIA3Layer(FusedForward):
    """The fused forward of ``ia3.Linear`` and ``ia3.Linear4bit``."""

    def active(self, **kwargs: Any) -> tuple[list[Tensor], str | None]:
        layer: Any = self
        gains = [layer.ia3_l[n].flatten() for n in layer.active_adapters if n in layer.ia3_l]
        found = switched_off(layer) or (None if gains else "no active adapter")
        for gain in gains:
            found = found or tensor_obstacle(gain, "ia3_l")
        if getattr(layer, "fan_in_fan_out", False):
            found = found or "fan_in_fan_out"
        return gains, found or base_obstacle(layer.base_layer)

    def input_obstacle(self, state: list[Tensor], x: Any) -> str | None:
        layer: Any = self
        found = call_obstacle(layer.base_layer, x, *state)
        if found is not None:
            return found
        N, K = weight_shape(layer.base_layer)
        if any(gain.shape != (K if layer.is_feedforward else N,) for gain in state):
            return "shape of ia3_l"
        if torch.is_autocast_enabled() and x.device.type != "cuda":
            return "CUDA autocast off CUDA"
        return None

    def fused(self, state: list[Tensor], x: Tensor) -> Tensor:
        layer: Any = self
        base, gain = layer.base_layer, state[0]
        for other in state[1:]:
            gain = gain * other
        if isinstance(layer, IA3Linear4bit) and not torch.is_autocast_enabled():
            x = x.float()
        if layer.is_feedforward:
            return adapted(base, (x.to(gain.dtype) * gain).to(x.dtype), bias=base.bias)
        bias = None if base.bias is None else gain * base.bias
        return adapted(base, x, bias=bias, g=gain)


class FusedIA3Linear(FusedIA3Layer, ia3.Linear):
    """``peft.tuners.ia3.Linear`` on the fused path."""


class FusedIA3Linear4bit(FusedIA3Layer, IA3Linear4bit):
    """``peft.tuners.ia3.Linear4bit`` on the fused path."""


FUSED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    ia3.Linear: FusedIA3Linear,
    IA3Linear4bit: FusedIA3Linear4bit,
}
