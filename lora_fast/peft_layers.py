"""PEFT's LoRA layers with a fused forward.

    y = x Wᵀ + Σᵢ sᵢ · (drop(x) Aᵢᵀ) Bᵢᵀ + bias + Σᵢ sᵢ · biasᵢ        (i over the active adapters)

The classes add a ``forward`` to PEFT's and nothing else: parameters, state_dict keys, repr, merging
and every adapter method are PEFT's own, and so is the forward wherever an obstacle is found.
Everything is read from the layer at each call, since adapters are added, deleted, switched and
hot-swapped, and scalings become tensors, at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn

from .base_linear import (
    CallCounts,
    adapted,
    base_obstacle,
    call_obstacle,
    environment_obstacle,
    module_obstacle,
    tensor_obstacle,
    weight_shape,
)

# Named arguments of a variant; PEFT takes them out of the call and vanilla LoRA ignores them.
_VARIANT_ARGUMENTS = frozenset(getattr(peft_layer, "VARIANT_KWARG_KEYS", ()))


class FusedLinear(lora.Linear):
    """``peft.tuners.lora.Linear`` on the fused path."""

    _lora_fast_calls: CallCounts

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _fused_or_stock(self, super().forward, x, args, kwargs)

    def _get_name(self) -> str:
        return lora.Linear.__name__


class FusedLinear4bit(Linear4bit):
    """``peft.tuners.lora.bnb.Linear4bit`` on the fused path."""

    _lora_fast_calls: CallCounts

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _fused_or_stock(self, super().forward, x, args, kwargs)

    def _get_name(self) -> str:
        return Linear4bit.__name__


FUSED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    lora.Linear: FusedLinear,
    Linear4bit: FusedLinear4bit,
}
STOCK_CLASSES = {fused: stock for stock, fused in FUSED_CLASSES.items()}


class _Adapter(NamedTuple):
    """One active adapter, as it is at this moment."""

    A: Tensor
    B: Tensor
    bias: Tensor | None
    scaling: float | Tensor
    dropout_p: float


def layer_obstacle(layer: Any) -> str | None:
    """Why this PEFT layer, in its present state, runs PEFT's own forward whatever the input."""
    return _read(layer)[1]


def _fused_or_stock(
    layer: Any, stock: Callable[..., Tensor], x: Tensor, args: tuple[Any, ...], kwargs: Any
) -> Tensor:
    calls: CallCounts = layer._lora_fast_calls
    adapters: list[_Adapter] = []
    found = environment_obstacle() or _arguments_obstacle(args, kwargs)
    if found is None:
        adapters, found = _read(layer)
    if found is None:
        found = _input_obstacle(layer, adapters, x)
    if found is not None:
        calls.add_fallback(found)
        return stock(x, *args, **kwargs)
    A, B, scaling = _stacked(adapters)
    y = adapted(
        layer.base_layer,
        x,
        A=A,
        B=B,
        scaling=scaling,
        bias=_total_bias(layer.base_layer.bias, adapters),
        dropout_p=adapters[0].dropout_p,
    )
    calls.fused += 1
    return y.to(_result_dtype(layer, y))


def _read(layer: Any) -> tuple[list[_Adapter], str | None]:
    """The active adapters, all of them unless the state of the layer holds an obstacle."""
    adapters: list[_Adapter] = []
    if layer.disable_adapters:
        return adapters, "adapters disabled"
    if layer.merged:
        return adapters, "merged"
    lora_A, lora_B, lora_dropout = layer.lora_A, layer.lora_B, layer.lora_dropout
    for name in layer.active_adapters:
        if name not in lora_A:
            continue
        if name in layer.lora_variant:
            return adapters, f"variant {type(layer.lora_variant[name]).__name__}"
        A, B, dropout = lora_A[name], lora_B[name], lora_dropout[name]
        found = _children_obstacle(A, B, dropout)
        if found is not None:
            return adapters, found
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        adapters.append(_Adapter(A.weight, B.weight, B.bias, layer.scaling[name], p))
    if not adapters:
        return adapters, "no active adapter"
    if len(adapters) > 1 and any(adapter.dropout_p for adapter in adapters):
        return adapters, "dropout with several adapters"
    return adapters, base_obstacle(layer.base_layer)


def _children_obstacle(A: Any, B: Any, dropout: nn.Module) -> str | None:
    return (
        module_obstacle(A, "lora_A", nn.Linear)
        or module_obstacle(B, "lora_B", nn.Linear)
        or module_obstacle(dropout, "lora_dropout", nn.Dropout, nn.Identity)
        or tensor_obstacle(A.weight, "lora_A")
        or tensor_obstacle(B.weight, "lora_B")
        or tensor_obstacle(B.bias, "lora_B")
        or ("lora_A has a bias" if A.bias is not None else None)
    )


def _arguments_obstacle(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if not args and not kwargs:
        return None
    if kwargs.get("adapter_names") is not None:
        return "adapter_names"
    if args or not _VARIANT_ARGUMENTS.issuperset(kwargs.keys() - {"adapter_names"}):
        return "extra arguments"
    return None


def _input_obstacle(layer: Any, adapters: list[_Adapter], x: Any) -> str | None:
    """Where PEFT itself would raise for x, its own forward is called to do so."""
    factors = [t for adapter in adapters for t in (adapter.A, adapter.B, adapter.bias)]
    found = call_obstacle(layer.base_layer, x, *factors)
    if found is not None:
        return found
    N, K = weight_shape(layer.base_layer)
    for adapter in adapters:
        if adapter.A.shape[1] != K or adapter.B.shape != (N, adapter.A.shape[0]):
            return "shapes of lora_A and lora_B"
    if torch.is_autocast_enabled() and x.device.type != "cuda" and isinstance(layer, Linear4bit):
        return "CUDA autocast off CUDA"
    return None if torch.is_autocast_enabled(x.device.type) else _cast_obstacle(layer, adapters, x)


def _cast_obstacle(layer: Any, adapters: list[_Adapter], x: Tensor) -> str | None:
    """Without autocast, PEFT casts x to lora_A's dtype, and nothing else to anything."""
    for A, B, bias, *_ in adapters:
        if A.dtype != B.dtype or (bias is not None and bias.dtype != B.dtype):
            return "lora_A and lora_B differ in dtype"
        if not layer.cast_input_dtype_enabled and x.dtype != A.dtype:
            return "x and lora_A differ in dtype"
    return None


def _stacked(adapters: list[_Adapter]) -> tuple[Tensor, Tensor, float | Tensor]:
    """A [ΣR, K], B [N, ΣR] and one scaling with s B A = Σ sᵢ Bᵢ Aᵢ."""
    first = adapters[0]
    if len(adapters) == 1:
        return first.A, first.B, first.scaling
    A = torch.cat([adapter.A for adapter in adapters])
    if all(isinstance(s, (int, float)) and s == first.scaling for *_, s, _ in adapters):
        return A, torch.cat([adapter.B for adapter in adapters], dim=1), first.scaling
    scaled = [adapter.B.float() * adapter.scaling for adapter in adapters]
    return A, torch.cat(scaled, dim=1), 1.0


def _total_bias(base_bias: Tensor | None, adapters: list[_Adapter]) -> Tensor | None:
    """The base's bias plus sᵢ times the bias of each lora_B (``lora_bias=True``), in float32."""
    total = base_bias
    for adapter in adapters:
        if adapter.bias is not None:
            term = adapter.bias.float() * adapter.scaling
            total = term if total is None else total.float() + term
    return total


def _result_dtype(layer: Any, y: Tensor) -> torch.dtype:
    """lora.Linear returns the base layer's dtype; lora.Linear4bit promotes under CUDA autocast."""
    if isinstance(layer, Linear4bit) and torch.is_autocast_enabled():
        return torch.promote_types(y.dtype, torch.get_autocast_dtype("cuda"))
    return y.dtype
