"""Obstacles to the kernels.

An *obstacle* is the reason, worded for the report, why the equation of ``linear.py`` cannot be
computed by :func:`lora_fast.functional.adapted_linear`; None means that it can. All state is read
from the layers on each call, since weights, hooks and dtypes may change in between. This code runs
before every call, and the host code determines the time of a single token's forward pass: hence
loops instead of generators, and no helpers for single comparisons.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.modules import module as module_hooks

from .. import four_bit
from ..features import is_exporting
from ..four_bit.decoding import CODES
from ..replaced import CALL, DROPOUT, DROPPED, LINEAR, PRODUCT, modes, replaced
from .linear import is_conv1d, weight_shape

PLAIN_TENSORS: tuple[type, ...] = (Tensor, nn.Parameter)
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CountingMode(FakeTensorMode):
    """A mode whose fake tensors count as ordinary ones, to count shapes and bytes."""


def module_obstacle(module: nn.Module, role: str, *types: type) -> str | None:
    """Why calling `module` may do more than the forward of exactly one of `types`."""
    if type(module) not in types:
        return f"{role} is {type(module).__name__}"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        parameters = module._parameters.values()
        return next(filter(None, (_partition_obstacle(p, role) for p in parameters)), None) or (
            f"hooks on {role}"
        )
    replaced = "forward" in module.__dict__ and not runs_own_forward(module)
    if replaced or module._compiled_call_impl is not None:
        return f"forward of {role} replaced"
    return None


def runs_own_forward(module: nn.Module) -> bool:
    """Whether calling `module` only runs the forward of its class, on tensors of one device."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return True
    if _only_moves_input(module, forward):
        forward = module.__dict__.get("_old_forward")
    return (
        getattr(forward, "__self__", None) is module
        and getattr(forward, "__func__", None) is type(module).forward
    )


def _only_moves_input(module: nn.Module, forward: Any) -> bool:
    """Whether `forward` is the hook of a ``device_map``, which moves x to the weight's device."""
    hook: Any = module.__dict__.get("_hf_hook")
    return (
        type(hook).__module__ == "accelerate.hooks"
        and type(hook).__name__ == "AlignDevicesHook"
        and not hook.offload
        and isinstance(forward, functools.partial)
        and forward.func.__module__ == "accelerate.hooks"
    )


def tensor_obstacle(tensor: Tensor | None, role: str) -> str | None:
    """Why `tensor` is not ordinary dense memory (DTensor, torchao's subclasses, meta, sparse)."""
    if tensor is None:
        return None
    if type(tensor) not in PLAIN_TENSORS and not _is_counted(tensor):
        return f"{role} is {type(tensor).__name__}"
    if tensor.layout is not torch.strided or tensor.is_meta:
        return f"{role} is {'on the meta device' if tensor.is_meta else tensor.layout}"
    return _partition_obstacle(tensor, role) if hasattr(tensor, "ds_id") else None


def _is_counted(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and isinstance(tensor.fake_mode, CountingMode)


def _partition_obstacle(tensor: Tensor | None, role: str) -> str | None:
    """Whether DeepSpeed ZeRO-3 owns `tensor`, which is whole only while its module is called."""
    return f"{role} is partitioned by DeepSpeed ZeRO-3" if hasattr(tensor, "ds_id") else None


def base_obstacle(base: Any, *, takes_conv1d: bool = False) -> str | None:
    """Why the base layer's weight and bias cannot enter the equation directly; a Conv1D's, whose
    weight is [K, N], only where the caller takes it."""
    if takes_conv1d and is_conv1d(base):
        found = module_obstacle(base, "base layer", type(base))
        found = found or tensor_obstacle(base.weight, "weight")
    elif type(base) is nn.Linear or not isinstance(base, four_bit.classes or four_bit.find()):
        found = module_obstacle(base, "base layer", nn.Linear)
        found = found or tensor_obstacle(base.weight, "weight")
    else:
        found = module_obstacle(base, "base layer", *four_bit.classes) or _four_bit_obstacle(base)
    bias = None if found is not None else base.bias
    return found if bias is None else tensor_obstacle(bias, "bias")


def environment_obstacle() -> str | None:
    """Why the environment requires PyTorch's own operations, or calls of every module."""
    compiling = torch.compiler.is_compiling()
    if compiling and is_exporting():
        return "torch.export"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transform"
    if module_hooks._has_any_global_hook():
        return "global module hooks"
    if not compiling:
        if torch._C._get_tracing_state() is not None:
            return "torch.jit tracing"
        if forward_ad._current_level >= 0:
            return "forward-mode autograd"
    return replaced()


def is_eager() -> bool:
    """Whether there is no :func:`environment_obstacle`, and no torch.compile, in one expression."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or module_hooks._has_any_global_hook()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or nn.Linear.__call__ is not CALL
        or nn.Linear.forward is not LINEAR
        or functional.linear is not PRODUCT
        or nn.Dropout.forward is not DROPOUT
        or functional.dropout is not DROPPED
        or (modes() and replaced() is not None)
    )


def call_obstacle(base: Any, x: Any, *factors: Tensor | None) -> str | None:
    """Why x and `factors` (A, B, …) do not fit `base`; the plain path then raises its own error."""
    if not isinstance(x, Tensor):
        return f"x is {type(x).__name__}"
    found = tensor_obstacle(x, "x")
    if found is not None:
        return found
    N, K = weight_shape(base)
    if x.dim() == 0 or x.shape[-1] != K or N == 0 or K == 0:
        return "shape of x"
    weight, bias, device = base.weight, base.bias, x.device
    if weight.device != device:
        return "tensors on different devices"
    for t in factors:
        if t is not None and t.device != device:
            return "tensors on different devices"
    # Weights that base_obstacle accepts are dense or packed.
    is_dense = type(base) is nn.Linear or is_conv1d(base)
    return _dtype_obstacle(x, weight if is_dense else None, bias, factors)


def _four_bit_obstacle(base: Any) -> str | None:
    # FSDP replaces the parameter; for that case bitsandbytes keeps the state on the module.
    state = getattr(base.weight, "quant_state", None) or base.quant_state
    if state is None:
        return "base layer is not quantised yet"
    if state.quant_type not in CODES:
        return f"base layer is {state.quant_type}"
    if type(base.weight) not in (four_bit.weight_class, *PLAIN_TENSORS):
        return f"weight is {type(base.weight).__name__}"
    if type(base).forward is not four_bit.forward or (
        four_bit.library.matmul_4bit is not four_bit.product
    ):
        return "forward of Linear4bit replaced"
    return None


def _dtype_obstacle(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, factors: tuple[Tensor | None, ...]
) -> str | None:
    """weight: the dense one, None for a packed one."""
    dtype = x.dtype
    if weight is not None:
        mixed = weight.dtype != dtype or (bias is not None and bias.dtype != dtype)
        if mixed and not torch.is_autocast_enabled(x.device.type):
            return "x and base layer differ in dtype"
    for t in (x, weight, bias, *factors):
        if t is not None and t.dtype not in COMPUTE_DTYPES:
            return f"dtype {str(t.dtype).removeprefix('torch.')}"
    return None
