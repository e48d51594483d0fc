"""PEFT's DeLoRA layer: the strength of an adapter apart from its direction.

    y = x Wᵀ + (d ⊙ (drop(x) (A ⊙ w)ᵀ)) Bᵀ + bias
    d_i = λ / (R · max(‖A_i‖, 10⁻⁴) · max(‖B_:i‖, 10⁻⁴))

w [K] holds the norms of W's columns, frozen. A ⊙ w and d are built by autograd, of R × K and N × R
elements; λ, A and B train through them. Several active adapters are stacked along the rank.
Source: DeLoRA (Bini, Girrbach and Akata 2025).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.delora import DeloraLinear
from torch import Tensor, nn

from ..backends.torch_layer import joined
from ..base_layer.linear import adapted, weight_shape
from ..base_layer.obstacles import base_obstacle, call_obstacle, module_obstacle, tensor_obstacle
from .fused_forward import FusedForward, rate_of, switched_off

# The least norm that divides.
_LEAST = 1e-4


class Adapter(NamedTuple):
    """One active adapter in its current state; `bound` is λ / R."""

    A: Tensor
    B: Tensor
    bound: Tensor
    w: Tensor
    dropout_p: float


class FusedDeloraLinear(FusedForward, DeloraLinear):
    """``peft.tuners.delora.DeloraLinear`` on the fused path."""

    def active(self, **kwargs: Any) -> tuple[list[Adapter], str | None]:
        return _read(self)

    def input_obstacle(self, state: list[Adapter], x: Any) -> str | None:
        factors = [t for adapter in state for t in adapter[:4]]
        found = call_obstacle(self.base_layer, x, *factors)
        if found is not None:
            return found
        N, K = weight_shape(self.base_layer)
        for A, B, bound, w, _ in state:
            R = A.shape[0]
            if A.shape != (R, K) or B.shape != (N, R) or w.shape != (K,) or bound.numel() != 1:
                return "shapes of the DeLoRA factors"
            if torch.is_autocast_enabled(x.device.type):
                continue
            if not A.dtype == B.dtype == bound.dtype == torch.promote_types(x.dtype, w.dtype):
                return "x and the DeLoRA factors differ in dtype"
        return None

    def fused(self, state: list[Adapter], x: Tensor) -> Tensor:
        base = self.base_layer
        A, B, d = _stacked(state)
        p = state[0].dropout_p
        return adapted(base, x, bias=base.bias, A=A, B=B, d=d, dropout_p=p).to(x.dtype)


FUSED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {DeloraLinear: FusedDeloraLinear}


def _read(layer: Any) -> tuple[list[Adapter], str | None]:
    adapters: list[Adapter] = []
    found = switched_off(layer)
    if found is not None:
        return adapters, found
    for name in layer.active_adapters:
        if name not in layer.delora_A:
            continue
        A, B, dropout = layer.delora_A[name], layer.delora_B[name], layer.delora_dropout[name]
        strength, w = layer.delora_lambda[name], layer.delora_w_norm[name]
        found = module_obstacle(dropout, "delora_dropout", nn.Dropout, nn.Identity)
        for tensor, role in (
            *((A, "delora_A"), (B, "delora_B")),
            *((strength, "delora_lambda"), (w, "delora_w_norm")),
        ):
            found = found or tensor_obstacle(tensor, role)
        if found is not None:
            return adapters, found
        adapters.append(Adapter(A, B, strength / layer.r[name], w, rate_of(dropout)))
    if not adapters:
        return adapters, "no active adapter"
    if len(adapters) > 1 and any(adapter.dropout_p for adapter in adapters):
        return adapters, "dropout with several adapters"
    return adapters, base_obstacle(layer.base_layer)


def _stacked(adapters: list[Adapter]) -> tuple[Tensor, Tensor, Tensor]:
    """A ⊙ w [ΣR, K], B [N, ΣR] and d [ΣR], sums and products in float32 or wider."""
    found = []
    for A, B, bound, w, _ in adapters:
        wide = torch.promote_types(A.dtype, torch.float32)
        of_A = torch.linalg.vector_norm(A, dim=1, dtype=wide).clamp(min=_LEAST)
        of_B = torch.linalg.vector_norm(B, dim=0, dtype=wide).clamp(min=_LEAST)
        found.append((A.to(wide) * w, B, bound.to(wide) / (of_A * of_B)))
    if len(found) == 1:
        return found[0]
    As, Bs, ds = zip(*found, strict=True)
    return joined(As), joined(Bs, dim=1), joined(ds)
