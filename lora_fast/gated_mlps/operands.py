"""The linear layers of a gated MLP at a call, as its operation takes them, or why it does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import four_bit
from ..base_layer.linear import four_bit_dtype, weight_of
from ..base_layer.obstacles import base_obstacle, call_obstacle, runs_own_forward
from ..factors import Factors


class Operand(NamedTuple):
    """A layer that is part of the operation: its factors, the dtype in which it computes, and the
    one that it returns."""

    factors: Factors
    computes: torch.dtype
    returns: torch.dtype


def linears_of(module: nn.Module) -> dict[str, Any]:
    """The children of a module that are linear layers, adapted or not, by name."""
    return {
        name: child
        for name, child in module._modules.items()
        if child is not None
        and isinstance(getattr(child, "in_features", None), int)
        and isinstance(getattr(child, "out_features", None), int)
    }


def is_adapted(child: Any) -> bool:
    """Whether a layer is one of ours, whose calls are counted."""
    return child is not None and "_lora_fast_calls" in child.__dict__


def may_be_adapted(child: Any) -> bool:
    """Whether a layer is an adapted one, ours or stock."""
    return child is not None and (is_adapted(child) or hasattr(child, "get_base_layer"))


def no_linear(child: Any) -> str:
    """Why a module in the place of a linear layer runs its own forward."""
    return f"{type(child).__name__} is no layer of the operation"


def always_alone(child: Any) -> str | None:
    """Why a layer would run its own forward for any input; None if it is part of the operation."""
    if is_adapted(child) and hasattr(child, "operand"):
        base: Any = child.get_base_layer() if hasattr(child, "get_base_layer") else child.base_layer
        x = torch.empty(0, child.in_features, dtype=_dtype_of(base), device=base.weight.device)
    else:
        weight = getattr(child, "weight", None)
        if not isinstance(weight, Tensor):
            return no_linear(child)
        x = torch.empty(0, child.in_features, dtype=_dtype_of(child), device=weight.device)
    found = read(child, x, None)
    return found if isinstance(found, str) else None


def _dtype_of(linear: Any) -> torch.dtype:
    dtype: torch.dtype = linear.weight.dtype
    if dtype.is_floating_point:
        return dtype
    return getattr(linear, "compute_dtype", None) or torch.float32


def read(child: Any, x: Tensor, casts: torch.dtype | None) -> Operand | str:
    """A layer that reads x, or the reason why its own forward must run.

    `casts` is the dtype of autocast on x's device where that is on. x may be any tensor with the
    dtype, device and features of the input.
    """
    if child._forward_pre_hooks:
        return "hooks"
    # Only ours have both.
    ours: Any = getattr(type(child), "operand", None)
    if ours is not None:
        found: Operand | str = ours(child, x, casts)
        return found
    if type(child) is not nn.Linear and not isinstance(child, four_bit.classes or four_bit.find()):
        return no_linear(child)
    found = base_obstacle(child) or call_obstacle(child, x) or ""
    if found or child.weight.requires_grad:
        return found or "its weight trains"
    if type(child) is nn.Linear:
        computes = returns = casts or x.dtype
    elif casts is not None:
        return "autocast over a 4-bit layer without adapter"
    else:
        computes, returns = four_bit_dtype(child, x), x.dtype
    return Operand(Factors(weight_of(child), child.bias), computes, returns)


def obstacle(layers: Iterable[Any]) -> tuple[Any, str] | None:
    """The first of some modules whose call does more than its forward, or leaves an adapter out, so
    that the forward of the MLP must make it, and why; None if all are ordinary."""
    for layer in layers:
        if layer is None:
            return layer, "missing"
        own = layer.__dict__
        if (
            own["_forward_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or (own["_forward_pre_hooks"] and not _pass_arguments(own["_forward_pre_hooks"]))
        ):
            return layer, "hooks"
        if layer._compiled_call_impl is not None:
            return layer, "compiled by itself"
        if "forward" in own and not runs_own_forward(layer):
            return layer, "forward replaced"
        if own.get("_disable_adapters"):
            return layer, "adapters disabled"
        if own.get("merged_adapters") or own.get("_undo") is not None:
            return layer, "merged"
    return None


def _pass_arguments(hooks: Mapping[int, Any]) -> bool:
    """Whether hooks are those by which PEFT passes a layer the arguments of a call (adapter_names,
    alora_offsets): with them the layer runs by itself, and the MLP may be one operation."""
    homes = (getattr(getattr(hook, "func", None), "__module__", "") for hook in hooks.values())
    return all(home.startswith("peft.") for home in homes)
