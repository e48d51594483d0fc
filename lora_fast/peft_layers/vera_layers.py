"""PEFT's VeRA layer, dense and 4-bit: frozen random A and B shared by all layers, b and d train.

y = x Wᵀ + b ⊙ ((d ⊙ (drop(x) Aᵀ)) Bᵀ) + bias,     A [R, :K] and B [:N, R] cut from the shared ones
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners import vera
from torch import Tensor, nn

from ..base_linear import (
    adapted,
    base_obstacle,
    call_obstacle,
    module_obstacle,
    tensor_obstacle,
    weight_shape,
)
from .fused_forward import FusedForward, casts_input, rate_of, switched_off


class Adapter(NamedTuple):
    """The active adapter, as it is at this moment."""

    A: Tensor
    B: Tensor
    b: Tensor
    d: Tensor
    dropout_p: float


class FusedVeRALinear(FusedForward, vera.Linear):
    """``peft.tuners.vera.Linear`` on the fused path."""

    def active(self, **kwargs: Any) -> tuple[Adapter | None, str | None]:
        found = switched_off(self)
        names = [name for name in self.active_adapters if name in self.vera_lambda_d]
        if found is None and len(names) != 1:
            found = "several VeRA adapters" if names else "no active adapter"
        if found is not None:
            return None, found
        name = names[0]
        dropout = self.vera_dropout[name]
        A = self.vera_A[name][:, : self.in_features]
        B = self.vera_B[name][: self.out_features]
        b, d = self.vera_lambda_b[name], self.vera_lambda_d[name]
        found = module_obstacle(dropout, "vera_dropout", nn.Dropout, nn.Identity)
        for tensor, role in ((A, "vera_A"), (B, "vera_B"), (b, "vera_lambda"), (d, "vera_lambda")):
            found = found or tensor_obstacle(tensor, role)
        return Adapter(A, B, b, d, rate_of(dropout)), found or base_obstacle(self.base_layer)

    def input_obstacle(self, state: Adapter, x: Any) -> str | None:
        found = call_obstacle(self.base_layer, x, state.A, state.B, state.b, state.d)
        if found is not None:
            return found
        N, K = weight_shape(self.base_layer)
        R = state.d.shape[0]
        if state.A.shape != (R, K) or state.B.shape != (N, R) or state.b.shape != (N,):
            return "shapes of the VeRA factors"
        if torch.is_autocast_enabled(x.device.type):
            return None
        dtypes = {state.A.dtype, state.B.dtype, state.d.dtype}
        if not casts_input(self):
            dtypes.add(x.dtype)
        return "VeRA factors differ in dtype" if len(dtypes) > 1 else None

    def fused(self, state: Adapter, x: Tensor) -> Tensor:
        y = adapted(
            self.base_layer,
            x,
            bias=self.base_layer.bias,
            A=state.A,
            B=state.B,
            b=state.b,
            d=state.d,
            dropout_p=state.dropout_p,
        )
        return y.to(x.dtype)


FUSED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {vera.Linear: FusedVeRALinear}
