"""Switch a PEFT model to the fused path, and back."""

from __future__ import annotations

import sys
from functools import partial
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from ..base_layer.call_counts import CallCounts
from ..base_layer.obstacles import runs_own_forward
from ..experts.storage import decoded_bytes
from ..four_bit.decoded import provide_for
from ..four_bit.layout import resume_packing, suspend_packing
from ..gated_mlps.switch import fuse, release
from .report import adapted_layers

Model = TypeVar("Model", bound=nn.Module)


def accelerate(
    model: Model,
    *,
    group_shared_inputs: bool = True,
    fuse_mlp: bool = True,
    decode_int8: bool = False,
) -> Model:
    """Make the PEFT layers of `model` run fused, in place; idempotent. Returns `model`.

        y = g ⊙ (x Wᵀ + s · b ⊙ ((d ⊙ (drop(x) Aᵀ)) Bᵀ)) + bias

    The class of every linear layer of LoRA (with rsLoRA, LoRA-FA, MiCA, aLoRA, KaSA, DoRA), DeLoRA,
    VeRA, AdaLoRA and (IA)³, dense or 4-bit, becomes a subclass of it; so does that of LoRA on any
    other base.
    Their parameters, state_dict keys, repr and adapter methods stay as they are. Anything the fused
    path does not cover (merged or disabled adapters, other variants, hooks on the inner layers, …)
    falls back to PEFT's own forward;
    :func:`lora_fast.report` tells where, and why. Other kinds of layers (embeddings, convolutions,
    FourierFT, …) stay unchanged. Adapters that `model` adds, loads or hot-swaps later are covered,
    including layers that PEFT wraps for them; after ``peft.inject_adapter_in_model``, which keeps
    no tuner in the model, call ``accelerate`` again. Differentiating a fused layer twice raises
    RuntimeError. 4-bit weights of `model` that bitsandbytes has packed for inference on a CPU are
    unpacked, and are not packed again until :func:`decelerate`: :mod:`lora_fast.four_bit.layout`.

    ``group_shared_inputs``: LoRA layers that the forward of their parent always calls with one
    input (q, k and v; gate and up), by its source, are computed together when the first of them is
    called; see :mod:`lora_fast.peft_layers.shared_input`.

    ``fuse_mlp``: a module with adapted layers whose forward is found to be
    ``down(act(gate(x)) * up(x))`` runs as one operation, which does not save the product for
    backward; see :mod:`lora_fast.gated_mlps`. Its class becomes a subclass of it with the same
    name. What the operation does not cover falls back, layer by layer or as a whole, and is
    reported.

    ``decode_int8``: weights of bitsandbytes' 8-bit layers are decoded for each product, as those in
    4 bits are; bitsandbytes' own product rounds x to 8 bits as well. So the output changes: it is
    that of a dense layer with the decoded weight.

    Raises TypeError if `model` is not a Module, ValueError if it contains no adapted layer; `model`
    is then unchanged.
    """
    _check(model)
    check_switches(
        group_shared_inputs=group_shared_inputs, fuse_mlp=fuse_mlp, decode_int8=decode_int8
    )
    if next(adapted_layers(model), None) is None:
        raise ValueError(
            "model must contain adapted layers, got none; add them with peft.get_peft_model or "
            "lora_fast.convert"
        )
    if "peft.tuners.tuners_utils" in sys.modules:
        _cover(model, group_shared_inputs, fuse_mlp, decode_int8)
    else:
        _cover_mlps(model, fuse_mlp)
    suspend_packing(model)
    provide_for(model, decoded_bytes)
    return model


def decelerate(model: Model) -> Model:
    """Undo :func:`accelerate` exactly, in place; without accelerated layers nothing changes. A
    4-bit weight that was unpacked stays so until bitsandbytes packs it again, to the same bytes.

    Raises TypeError if `model` is not a Module.
    """
    _check(model)
    resume_packing(model)
    _cover_mlps(model, False)
    if "lora_fast.peft_layers" not in sys.modules:
        return model
    from ..peft_layers import STOCK_CLASSES

    modules: list[Any] = [module for module in model.modules() if type(module) in STOCK_CLASSES]
    _switch(modules, STOCK_CLASSES)
    for module in modules:
        for name in [name for name in module.__dict__ if name.startswith("_lora_fast_")]:
            del module.__dict__[name]
    return model


def _cover(model: nn.Module, group_shared_inputs: bool, fuse_mlp: bool, decode_int8: bool) -> None:
    """Switch every layer and tuner in `model` that is not switched yet, and group anew."""
    from ..peft_layers import COVER, FUSED_CLASSES, TUNER_CLASSES, FusedLoRALayer, shared_input
    from ..peft_layers.opaque_layers import OpaqueLoRALayer

    layers: list[Any] = [
        module
        for module in model.modules()
        if type(module) in FUSED_CLASSES and runs_own_forward(module)
    ]
    tuners = [module for module in model.modules() if type(module) in TUNER_CLASSES]
    _switch([*layers, *tuners], {**FUSED_CLASSES, **TUNER_CLASSES})
    for layer in layers:
        layer._lora_fast_calls = CallCounts()
    for module in model.modules():
        if type(module) in TUNER_CLASSES.values():
            module.__dict__[COVER] = partial(
                _cover,
                group_shared_inputs=group_shared_inputs,
                fuse_mlp=fuse_mlp,
                decode_int8=decode_int8,
            )
        elif isinstance(module, OpaqueLoRALayer):
            module._lora_fast_decodes_int8 = decode_int8
    shared_input.dissolve(model)
    if group_shared_inputs:
        shared_input.assign(model, FusedLoRALayer)
    _cover_mlps(model, fuse_mlp)


def _cover_mlps(model: nn.Module, fuse_mlp: bool) -> None:
    """Let the gated MLPs of `model` run fused, or none."""
    if fuse_mlp:
        fuse(model)
    else:
        release(model)


def _switch(modules: list[Any], classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Give every module its class in `classes`, or leave all of them as they were."""
    previous = [type(module) for module in modules]
    try:
        for module in modules:
            _set_class(module, classes[type(module)])
    except BaseException:
        for module, cls in zip(modules, previous, strict=True):
            _set_class(module, cls)
        raise


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    forward = type(module).forward
    module.__class__ = cls
    # Hugging Face's device hooks keep the forward of the class as a method bound to the module.
    for name in ("forward", "_old_forward"):
        if getattr(module.__dict__.get(name), "__func__", None) is forward:
            module.__dict__[name] = MethodType(cls.forward, module)


def check_switches(**switches: Any) -> None:
    """Raise TypeError unless every one of these arguments is a bool."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
