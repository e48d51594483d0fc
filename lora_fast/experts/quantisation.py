"""Quantising the experts of a model after loading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..nf4 import BLOCKSIZES, NF4Weight
from .storage import packed_parameters, store_packed

Model = TypeVar("Model", bound=nn.Module)


def quantize_experts(
    model: Model, *, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> Model:
    """Store the weights of all experts of `model` in NF4, in place, before ``get_peft_model``.

        W[i] = round(code[nibble_i] · absmax[i // blocksize])        i over the flattened parameter

    Experts are the parameters [E, …, …] of modules that hold ``num_experts`` of them; linear
    layers, biases and routers stay as they are. bitsandbytes quantises on the device of each
    parameter, one after the other. Saved keys are those of ``bitsandbytes.nn.parametrize``, and
    ``load_state_dict`` of a model that is quantised alike reads them, on the meta device, too, with
    ``assign=True``. PEFT adapts the parameters as it adapts dense ones;
    :func:`lora_fast.accelerate` computes with them an expert at a time. Without it, and where it
    falls back, PEFT's own code runs on decoded weights; its merging raises. Parameters that are in
    NF4 already stay so. Returns `model`. Source: QLoRA (Dettmers et al. 2023, §3).
    :func:`lora_fast.quantize_experts_on_load` does it while a model is loaded.

    Raises TypeError or ValueError, with `model` unchanged, for arguments that are out of range, a
    model without experts or with adapters on them, weights of no floating dtype, and experts whose
    elements are not a multiple of `blocksize`; ImportError without bitsandbytes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_options(quant_type, blocksize, double_quant)
    if any(hasattr(module, "parameter_name") for module in model.modules()):
        raise ValueError(
            "model must have no adapters on parameters yet, got some: quantise the experts before "
            "get_peft_model"
        )
    found = list(_dense_experts(model))
    if not found and not any(map(packed_parameters, model.modules())):
        raise ValueError("model must contain experts that are parameters [E, …, …], got none")
    for path, weight in ((path, weight) for path, _, _, weight in found):
        check_weight(path, weight, blocksize)
    for _, module, name, _ in found:
        packed, state = packed_like(module._parameters[name], blocksize, double_quant)
        store_packed(module, name, packed, state)
    return model


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the modules that hold weights [experts, N, K], or transposed ones, in 16 or
    in 4 bits."""
    for name, module in model.named_modules():
        if expert_parameters(module) or packed_parameters(module):
            yield name, module


def expert_parameters(module: nn.Module) -> list[str]:
    """The names of the dense parameters [experts, N, K] of a module."""
    count = getattr(module, "num_experts", None)
    own = module.named_parameters(recurse=False)
    return [name for name, p in own if p.dim() == 3 and p.shape[0] == count]


def packed_like(weight: Any, blocksize: int, double_quant: bool) -> tuple[Tensor, Any]:
    """The packed bytes [n / 2, 1] and the ``quant_state`` of a dense weight [E, P, Q]."""
    rows = weight.detach().reshape(-1, weight.shape[-1])
    quantised = NF4Weight.from_dense(rows, blocksize=blocksize, double_quant=double_quant)
    state = quantised.quant_state
    state.shape = torch.Size(weight.shape)
    return quantised.packed.view(-1, 1), state


def _dense_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    for path, module in model.named_modules():
        for name in expert_parameters(module):
            yield f"{path}.{name}", module, name, module._parameters[name]


def check_options(quant_type: Any, blocksize: Any, double_quant: Any) -> None:
    """Raise TypeError or ValueError that names an option out of range."""
    if quant_type != "nf4":
        raise ValueError(f"quant_type must be 'nf4', got {quant_type!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize!r}")
    if not isinstance(double_quant, bool):
        raise TypeError(f"double_quant must be a bool, got {type(double_quant).__name__}")


def check_weight(path: str, weight: Tensor, blocksize: int) -> None:
    """Raise ValueError for experts that cannot be stored in 4 bits."""
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{path} must be float32, bfloat16 or float16, got {weight.dtype}")
    if weight.shape[1] * weight.shape[2] % blocksize:
        raise ValueError(
            f"{path} must have a multiple of blocksize = {blocksize} elements an expert, got "
            f"{weight.shape[1]} × {weight.shape[2]}"
        )
