"""PEFT's AdaLoRA layers: the adapter as a singular value decomposition whose rank is allocated.

    y = x Wᵀ + s · ((E ⊙ (drop(x) Aᵀ)) Bᵀ) + bias,     s = α / (number of ranks in use + 10⁻⁵)

Several active adapters are stacked along the rank. Source: AdaLoRA (Zhang et al. 2023, eq. 3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners import adalora
from torch import Tensor, nn

from ..backends.torch_layer import joined
from ..base_layer.linear import adapted, weight_shape
from ..base_layer.obstacles import base_obstacle, call_obstacle, module_obstacle, tensor_obstacle
from .four_bit_classes import SVDLinear4bit
from .fused_forward import FusedForward, casts_input, rate_of, switched_off


class Adapter(NamedTuple):
    """One active adapter in its current state; d = s · E."""

    A: Tensor
    B: Tensor
    d: Tensor
    dropout_p: float


class FusedAdaLoRALayer(FusedForward):
    """The fused forward of ``adalora.SVDLinear`` and ``adalora.SVDLinear4bit``."""

    def active(self, **kwargs: Any) -> tuple[list[Adapter], str | None]:
        return _read(self)

    def input_obstacle(self, state: list[Adapter], x: Any) -> str | None:
        layer: Any = self
        factors = [t for adapter in state for t in (adapter.A, adapter.B, adapter.d)]
        found = call_obstacle(layer.base_layer, x, *factors)
        if found is not None:
            return found
        N, K = weight_shape(layer.base_layer)
        for A, B, d, _ in state:
            R = d.shape[0]
            if R == 0:
                return "rank 0"
            if A.shape != (R, K) or B.shape != (N, R):
                return "shapes of lora_A, lora_B and lora_E"
        if torch.is_autocast_enabled() and x.device.type != "cuda":
            return "CUDA autocast off CUDA"
        if torch.is_autocast_enabled(x.device.type):
            return None
        dtypes = {t.dtype for adapter in state for t in (adapter.A, adapter.B)}
        if not casts_input(layer):
            dtypes.add(x.dtype)
        return "x and the AdaLoRA factors differ in dtype" if len(dtypes) > 1 else None

    def fused(self, state: list[Adapter], x: Tensor) -> Tensor:
        layer: Any = self
        A, B, d = _stacked(state)
        return adapted(
            layer.base_layer,
            x,
            bias=layer.base_layer.bias,
            A=A,
            B=B,
            d=d,
            dropout_p=state[0].dropout_p,
        )


class FusedSVDLinear(FusedAdaLoRALayer, adalora.SVDLinear):
    """``peft.tuners.adalora.SVDLinear`` on the fused path."""


class FusedSVDLinear4bit(FusedAdaLoRALayer, SVDLinear4bit):
    """``peft.tuners.adalora.SVDLinear4bit`` on the fused path."""


FUSED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    adalora.SVDLinear: FusedSVDLinear,
    SVDLinear4bit: FusedSVDLinear4bit,
}


def _read(layer: Any) -> tuple[list[Adapter], str | None]:
    adapters: list[Adapter] = []
    found = switched_off(layer)
    if found is not None:
        return adapters, found
    # By name, so that the order of activation does not even affect the rounding.
    for name in sorted(layer.active_adapters):
        if name not in layer.lora_A:
            continue
        A, B, E = layer.lora_A[name], layer.lora_B[name], layer.lora_E[name]
        dropout = layer.lora_dropout[name]
        found = module_obstacle(dropout, "lora_dropout", nn.Dropout, nn.Identity)
        for tensor, role in ((A, "lora_A"), (B, "lora_B"), (E, "lora_E")):
            found = found or tensor_obstacle(tensor, role)
        if E.dtype != A.dtype:
            found = found or "lora_A and lora_E differ in dtype"
        if found is not None:
            return adapters, found
        # A tensor, which PEFT accidentally trains on a 16-bit base; so it does here.
        scaling = layer.scaling[name] / (layer.ranknum[name] + 1e-5)
        adapters.append(Adapter(A, B, E.reshape(-1) * scaling, rate_of(dropout)))
    if not adapters:
        return adapters, "no active adapter"
    if len(adapters) > 1 and any(adapter.dropout_p for adapter in adapters):
        return adapters, "dropout with several adapters"
    return adapters, base_obstacle(layer.base_layer)


def _stacked(adapters: list[Adapter]) -> tuple[Tensor, Tensor, Tensor]:
    """A [ΣR, K], B [N, ΣR] and d [ΣR] with B diag(d) A = Σ Bᵢ diag(dᵢ) Aᵢ."""
    if len(adapters) == 1:
        first = adapters[0]
        return first.A, first.B, first.d
    A = joined([adapter.A for adapter in adapters])
    B = joined([adapter.B for adapter in adapters], dim=1)
    return A, B, joined([adapter.d for adapter in adapters])
