"""PEFT's VeRA layer, dense and 4-bit: frozen random A and B shared by all layers; b and d train.

y = x Wᵀ + b ⊙ ((d ⊙ (drop(x) Aᵀ)) Bᵀ) + bias,     A [R, :K] and B [:N, R] cut from the shared ones
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners import vera
from torch import Tensor, nn

from ..base_layer.linear import adapted, weight_shape
from ..base_layer.obstacles import base_obstacle, call_obstacle, module_obstacle, tensor_obstacle
from .four_bit_classes import VeRALinear4bit
from .fused_forward import FusedForward, casts_input, rate_of, switched_off


class Adapter(NamedTuple):
    """The active adapter in its current state."""

    A: Tensor
    B: Tensor
    b: Tensor
    d: Tensor
    dropout_p: float


class FusedVeRALayer(FusedForward):
    """The fused forward of ``vera.Linear``, and of ``vera.Linear4bit`` if PEFT has it."""

    def active(self, **kwargs: Any) -> tuple[Adapter | None, str | None]:
        layer: Any = self
        found = switched_off(layer)
        names = [name for name in layer.active_adapters if name in layer.vera_lambda_d]
        if found is None and len(names) != 1:
            found = "several VeRA adapters" if names else "no active adapter"
        if found is not None:
            return None, found
        name = names[0]
        dropout = layer.vera_dropout[name]
        A = layer.vera_A[name][:, : layer.in_features]
        B = layer.vera_B[name][: layer.out_features]
        b, d = layer.vera_lambda_b[name], layer.vera_lambda_d[name]
        found = module_obstacle(dropout, "vera_dropout", nn.Dropout, nn.Identity)
        for tensor, role in ((A, "vera_A"), (B, "vera_B"), (b, "vera_lambda"), (d, "vera_lambda")):
            found = found or tensor_obstacle(tensor, role)
        return Adapter(A, B, b, d, rate_of(dropout)), found or base_obstacle(layer.base_layer)

    def input_obstacle(self, state: Adapter, x: Any) -> str | None:
        layer: Any = self
        found = call_obstacle(layer.base_layer, x, state.A, state.B, state.b, state.d)
        if found is not None:
            return found
        N, K = weight_shape(layer.base_layer)
        R = state.d.shape[0]
        if state.A.shape != (R, K) or state.B.shape != (N, R) or state.b.shape != (N,):
            return "shapes of the VeRA factors"
        if torch.is_autocast_enabled(x.device.type):
            return None
        dtypes = {state.A.dtype, state.B.dtype, state.d.dtype}
        if not casts_input(layer):
            dtypes.add(x.dtype)
        return "VeRA factors differ in dtype" if len(dtypes) > 1 else None

    def fused(self, state: Adapter, x: Tensor) -> Tensor:
        layer: Any = self
        base = layer.base_layer
        y = adapted(
            base,
            x,
            bias=base.bias,
            A=state.A,
            B=state.B,
            b=state.b,
            d=state.d,
            dropout_p=state.dropout_p,
        )
        return y.to(x.dtype)


class FusedVeRALinear(FusedVeRALayer, vera.Linear):
    """``peft.tuners.vera.Linear`` on the fused path."""


class FusedVeRALinear4bit(FusedVeRALayer, VeRALinear4bit):
    """``peft.tuners.vera.Linear4bit`` on the fused path, which PEFT has below 0.20."""

    def fused(self, state: Adapter, x: Tensor) -> Tensor:
        y = super().fused(state, x)
        # PEFT casts x to the dtype of d, and the result to that of the x it then has.
        return y if torch.is_autocast_enabled() else y.to(state.d.dtype)


FUSED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    vera.Linear: FusedVeRALinear,
    VeRALinear4bit: FusedVeRALinear4bit,
}
