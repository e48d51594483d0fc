"""Lets the gated MLPs of a model run fused, and gives them their classes back."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from ..base_layer.call_counts import CallCounts
from .discovery import STATE, is_bound_by_liger, prove, slot_of
from .fused_mlp import STOCK, FusedMLP, MLPState, fused_class
from .operands import is_adapted, linears_of


def fuse(model: nn.Module) -> None:
    """Let every gated MLP of `model` with an adapted layer run fused, which its forward is proven
    to be; those that do already keep their counts."""
    for module in list(model.modules()):
        if isinstance(module, FusedMLP):
            _take_over(module)
            continue
        linears = linears_of(module)
        if not any(map(is_adapted, linears.values())):
            continue
        mlp = prove(module, linears).mlp
        if mlp is not None and any(is_adapted(linears[name]) for name in mlp.names):
            _switch(module)


def release(model: nn.Module) -> None:
    """Give every fused MLP of `model` its class and forward back."""
    for module in model.modules():
        if not isinstance(module, FusedMLP):
            continue
        state: MLPState | None = module.__dict__.pop(STATE, None)
        stock = type(module).__dict__.get(STOCK)
        if stock is not None:  # else a class that somebody derived from the fused one
            _set_class(module, stock)
        if state is not None and state.liger is not None:
            module.__dict__[slot_of(module)] = MethodType(state.liger, module)


def _switch(module: nn.Module) -> None:
    cls: Any = type(module)
    try:
        _set_class(module, fused_class(cls))
    except TypeError:  # the class cannot be derived from, or holds memory of its own
        return
    module.__dict__[STATE] = MLPState(CallCounts())
    _take_over(module)


def _take_over(module: Any) -> None:
    """Put our forward in the place of one of Liger's that was set on the module."""
    slot = slot_of(module)
    forward = module.__dict__.get(slot)
    if not is_bound_by_liger(module, forward):
        return
    module.__dict__[STATE].liger = forward.__func__
    del module.__dict__[slot]
    if slot != "forward":
        module.__dict__[slot] = MethodType(type(module).forward, module)


def _set_class(module: nn.Module, cls: type) -> None:
    forward = type(module).forward
    module.__class__ = cls
    # Hugging Face's device hooks keep the forward of the class as a method bound to the module.
    for name in ("forward", "_old_forward"):
        if getattr(module.__dict__.get(name), "__func__", None) is forward:
            module.__dict__[name] = MethodType(cls.forward, module)  # type: ignore[attr-defined]
