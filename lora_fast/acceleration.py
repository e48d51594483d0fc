"""Switch a PEFT model to the fused path, and back."""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from .base_linear import CallCounts, runs_own_forward
from .reporting import adapted_layers

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, group_shared_inputs: bool = True) -> Model:
    """Let the PEFT layers of `model` run fused; in place, and idempotent. Returns `model`.

        y = g ⊙ (x Wᵀ + s · b ⊙ ((d ⊙ (drop(x) Aᵀ)) Bᵀ)) + bias

    The class of every linear layer of LoRA (with rsLoRA, LoRA-FA, DoRA), VeRA, AdaLoRA and (IA)³,
    dense or 4-bit, becomes a subclass of it. Their parameters, state_dict keys, repr and adapter
    methods stay as they are. What the fused path does not cover (merged or disabled adapters, other
    variants, hooks on the inner layers, …) runs PEFT's own forward; :func:`lora_fast.report` tells
    where, and why. Layers of other kinds (embeddings, convolutions, FourierFT, …) are left alone.
    Adapters that are added to these layers later are covered. Layers that PEFT wraps later are
    not: call ``accelerate`` again. Differentiating a fused layer twice raises RuntimeError.

    ``group_shared_inputs``: LoRA layers with the same parent and names that model families give to
    layers of one input (q, k and v; gate and up) are computed together when the first of them is
    called; see :mod:`lora_fast.peft_layers.shared_input`.

    Raises TypeError if `model` is not a Module, ValueError if it contains no adapted layer; `model`
    is then as it was.
    """
    _check(model)
    if not isinstance(group_shared_inputs, bool):
        raise TypeError(
            f"group_shared_inputs must be a bool, got {type(group_shared_inputs).__name__}"
        )
    if next(adapted_layers(model), None) is None:
        raise ValueError(
            "model must contain adapted layers, got none; add them with peft.get_peft_model or "
            "lora_fast.convert"
        )
    if "peft.tuners.tuners_utils" not in sys.modules:
        return model
    from .peft_layers import FUSED_CLASSES, FusedLoRALayer, shared_input

    layers: list[Any] = [
        module
        for module in model.modules()
        if type(module) in FUSED_CLASSES and runs_own_forward(module)
    ]
    _switch(layers, FUSED_CLASSES)
    for layer in layers:
        layer._lora_fast_calls = CallCounts()
    shared_input.dissolve(model)
    if group_shared_inputs:
        shared_input.assign(model, FusedLoRALayer)
    return model


def decelerate(model: Model) -> Model:
    """Undo :func:`accelerate` exactly, in place; without accelerated layers nothing changes.

    Raises TypeError if `model` is not a Module.
    """
    _check(model)
    if "lora_fast.peft_layers" not in sys.modules:
        return model
    from .peft_layers import STOCK_CLASSES

    layers: list[Any] = [module for module in model.modules() if type(module) in STOCK_CLASSES]
    _switch(layers, STOCK_CLASSES)
    for layer in layers:
        for name in [name for name in layer.__dict__ if name.startswith("_lora_fast_")]:
            del layer.__dict__[name]
    return model


def _switch(layers: list[nn.Module], classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Give every layer its class in `classes`, or leave all of them as they were."""
    previous = [type(layer) for layer in layers]
    try:
        for layer in layers:
            _set_class(layer, classes[type(layer)])
    except BaseException:
        for layer, cls in zip(layers, previous, strict=True):
            _set_class(layer, cls)
        raise


def _set_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    forward = type(layer).forward
    layer.__class__ = cls
    # Hugging Face's device hooks keep the forward of the class as a method bound to the layer.
    for name in ("forward", "_old_forward"):
        if getattr(layer.__dict__.get(name), "__func__", None) is forward:
            layer.__dict__[name] = MethodType(cls.forward, layer)


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
