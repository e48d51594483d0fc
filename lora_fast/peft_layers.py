"""PEFT's LoRA layers with a fused forward.

    y = x Wᵀ + Σᵢ sᵢ · (drop(x) Aᵢᵀ) Bᵢᵀ + bias + Σᵢ sᵢ · biasᵢ        (i over the active adapters)

The classes add a ``forward`` to PEFT's and nothing else: parameters, state_dict keys, repr, merging
and every adapter method are PEFT's own, and so is the forward wherever an obstacle is found.
Everything is read from the layer at each call, since adapters are added, deleted, switched and
hot-swapped, and scalings become tensors, at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def layer_obstacle(layer: Any) -> str | None:
    """Why this PEFT layer, in its present state, runs PEFT's own forward whatever the input."""
    if layer.disable_adapters:
        return "adapters disabled"
    if layer.merged:
        return "merged"
    names = _active_adapters(layer)
    if not names:
        return "no active adapter"
    for name in names:
        found = _adapter_obstacle(layer, name)
        if found is not None:
            return found
    if len(names) > 1 and any(_dropout_p(layer.lora_dropout[name]) for name in names):
        return "dropout with several adapters"
    return base_obstacle(layer.base_layer)


def _fused_or_stock(
    layer: Any, stock: Callable[..., Tensor], x: Tensor, args: tuple[Any, ...], kwargs: Any
) -> Tensor:
    found = (
        environment_obstacle()
        or layer_obstacle(layer)
        or _arguments_obstacle(args, kwargs)
        or _input_obstacle(layer, x)
    )
    calls = layer._lora_fast_calls
    if found is not None:
        calls.add_fallback(found)
        return stock(x, *args, **kwargs)
    y = _fused(layer, x)
    calls.fused += 1
    return y


def _fused(layer: Any, x: Tensor) -> Tensor:
    names = _active_adapters(layer)
    A, B, scaling = _stacked(layer, names)
    y = adapted(
        layer.base_layer,
        x,
        A=A,
        B=B,
        scaling=scaling,
        bias=_total_bias(layer, names),
        dropout_p=_dropout_p(layer.lora_dropout[names[0]]),
    )
    return y.to(_result_dtype(layer, y))


def _stacked(layer: Any, names: list[str]) -> tuple[Tensor, Tensor, float | Tensor]:
    """A [ΣR, K], B [N, ΣR] and one scaling with s B A = Σ sᵢ Bᵢ Aᵢ."""
    As = [layer.lora_A[name].weight for name in names]
    Bs = [layer.lora_B[name].weight for name in names]
    scalings = [layer.scaling[name] for name in names]
    if len(names) == 1:
        return As[0], Bs[0], scalings[0]
    if all(isinstance(s, (int, float)) and s == scalings[0] for s in scalings):
        return torch.cat(As), torch.cat(Bs, dim=1), scalings[0]
    scaled = [B.float() * s for B, s in zip(Bs, scalings, strict=True)]
    return torch.cat(As), torch.cat(scaled, dim=1), 1.0


def _total_bias(layer: Any, names: list[str]) -> Tensor | None:
    """The base's bias plus sᵢ times the bias of each lora_B (``lora_bias=True``), in float32."""
    total = layer.base_layer.bias
    for name in names:
        bias = layer.lora_B[name].bias
        if bias is not None:
            term = bias.float() * layer.scaling[name]
            total = term if total is None else total.float() + term
    return total


def _result_dtype(layer: Any, y: Tensor) -> torch.dtype:
    """lora.Linear returns the base layer's dtype; lora.Linear4bit promotes under CUDA autocast."""
    if isinstance(layer, Linear4bit) and torch.is_autocast_enabled():
        return torch.promote_types(y.dtype, torch.get_autocast_dtype("cuda"))
    return y.dtype


def _active_adapters(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _adapter_obstacle(layer: Any, name: str) -> str | None:
    if name in layer.lora_variant:
        return f"variant {type(layer.lora_variant[name]).__name__}"
    A, B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    return (
        module_obstacle(A, "lora_A", nn.Linear)
        or module_obstacle(B, "lora_B", nn.Linear)
        or module_obstacle(dropout, "lora_dropout", nn.Dropout, nn.Identity)
        or tensor_obstacle(A.weight, "lora_A")
        or tensor_obstacle(B.weight, "lora_B")
        or tensor_obstacle(B.bias, "lora_B")
        or ("lora_A has a bias" if A.bias is not None else None)
    )


def _dropout_p(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _arguments_obstacle(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if kwargs.get("adapter_names") is not None:
        return "adapter_names"
    if args or not _VARIANT_ARGUMENTS.issuperset(kwargs.keys() - {"adapter_names"}):
        return "extra arguments"
    return None


def _input_obstacle(layer: Any, x: Any) -> str | None:
    """Where PEFT itself would raise for x, its own forward is called to do so."""
    names = _active_adapters(layer)
    factors = [t for name in names for t in _factors(layer, name)]
    found = call_obstacle(layer.base_layer, x, *factors)
    if found is not None:
        return found
    N, K = weight_shape(layer.base_layer)
    for name in names:
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        if A.shape[1] != K or B.shape != (N, A.shape[0]):
            return "shapes of lora_A and lora_B"
    if torch.is_autocast_enabled() and x.device.type != "cuda" and isinstance(layer, Linear4bit):
        return "CUDA autocast off CUDA"
    return None if torch.is_autocast_enabled(x.device.type) else _cast_obstacle(layer, x, names)


def _cast_obstacle(layer: Any, x: Tensor, names: list[str]) -> str | None:
    """Without autocast, PEFT casts x to lora_A's dtype, and nothing else to anything."""
    for name in names:
        dtypes = {t.dtype for t in _factors(layer, name)}
        if len(dtypes) > 1:
            return "lora_A and lora_B differ in dtype"
        if not layer.cast_input_dtype_enabled and x.dtype not in dtypes:
            return "x and lora_A differ in dtype"
    return None


def _factors(layer: Any, name: str) -> list[Tensor]:
    lora_B = layer.lora_B[name]
    factors = [layer.lora_A[name].weight, lora_B.weight]
    return factors if lora_B.bias is None else [*factors, lora_B.bias]
