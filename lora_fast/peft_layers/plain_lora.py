"""The short way of a LoRA layer's forward: one plain adapter on a frozen layer, and no hooks.

Most calls of most models are of this kind, and their checks are the time of a small layer. So the
layer is read here at one go, without PEFT's properties, nn.Module's lookups of attributes and a
function for each condition. Nothing of a layer is kept between calls. Whatever is not recognised at
once takes the long way (fused_forward.py, lora_state.py), which knows all cases and words the
obstacles.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import four_bit
from ..base_layer.obstacles import environment_obstacle
from ..factors import Constants, Factors
from ..geometry import of_plain
from ..nf4 import NF4Weight
from ..operation.autograd import run

_COMPUTE_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_TENSORS = frozenset((Tensor, nn.Parameter))
# The attribute of a parameter that DeepSpeed ZeRO-3 has partitioned.
_PARTITIONED = "ds_id"
# Geometries that fit, with the circumstances that decide beside them; a run with more of them
# begins anew.
_MOST = 4096
_fitting: set[Any] = set()


class Plain(NamedTuple):
    """A layer with one adapter: y = x Wᵀ + s · (drop(x) Aᵀ) Bᵀ + bias; `dtype` is that in which a
    4-bit layer computes."""

    weight: Tensor | NF4Weight
    bias: Tensor | None
    A: Tensor
    B: Tensor
    constants: Constants
    dtype: torch.dtype | None


def plain_output(layer: Any, x: Any) -> Tensor | None:
    """The output of a layer for x; None if it takes the long way."""
    if torch.compiler.is_compiling() or environment_obstacle() is not None:
        return None
    plain = read_plain(layer)
    if plain is None or type(x) not in _TENSORS or x.layout is not torch.strided:
        return None
    W, bias, A, B, constants, dtype = plain
    if not (x.is_cuda or x.is_cpu):
        return None
    kind = "cuda" if x.is_cuda else "cpu"
    casts = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if dtype is not None:
        return _four_bit_output(layer, plain, x, casts)
    geometry = of_plain(x, W, bias, A, B, constants)  # type: ignore[arg-type]
    asked = (geometry, casts, layer.__dict__.get("cast_input_dtype_enabled", True))
    if asked not in _fitting:
        if geometry is None or not fits(layer, plain, x, casts):
            return None
        if len(_fitting) >= _MOST:
            _fitting.clear()
        _fitting.add(asked)
    if casts is not None and x.dtype is not casts:
        x, geometry = x.to(casts), None
    return run(x, (Factors(W, bias, A, B, None, None, None, constants),), None, geometry)[0]


def _four_bit_output(
    layer: Any, plain: Plain, x: Tensor, casts: torch.dtype | None
) -> Tensor | None:
    """y has the dtype of x, and under CUDA's autocast at least that of autocast."""
    W, bias, A, B, constants, dtype = plain
    under_cuda = torch.is_autocast_enabled("cuda")
    if not fits(layer, plain, x, casts) or (under_cuda and not x.is_cuda):
        return None
    given, wanted = x.dtype, dtype if casts is None else casts
    x = x if given is wanted else x.to(wanted)
    (y,) = run(x, (Factors(W, bias, A, B, None, None, None, constants),))
    result = torch.promote_types(given, casts) if casts is not None and under_cuda else given
    return y if y.dtype is result else y.to(result)


def read_plain(layer: Any) -> Plain | None:
    """The current state of a layer; None unless it is plain and nothing observes its parts."""
    name = layer._active_adapter
    if type(name) is not str:
        if len(name) != 1:
            return None
        name = name[0]
    modules = layer._modules
    A, scaling = modules["lora_A"]._modules.get(name), layer.scaling.get(name)
    if (
        A is None
        or layer._disable_adapters
        or layer.merged_adapters
        or name in layer.lora_variant
        or type(scaling) is not float
        or not -math.inf < scaling < math.inf
    ):
        return None
    B, base = modules["lora_B"]._modules[name], modules["base_layer"]
    dropout, p = modules["lora_dropout"]._modules[name], 0.0
    if type(dropout) is nn.Dropout:
        if dropout.training:
            p = dropout.p
            if type(p) is not float or not 0.0 <= p <= 1.0:
                return None
    elif type(dropout) is not nn.Identity:
        return None
    if not (
        type(A) is type(B) is nn.Linear
        and _runs_alone(A)
        and _runs_alone(B)
        and _runs_alone(base)
        and _runs_alone(dropout)
    ):
        return None
    of_A, of_B, of_base = A._parameters, B._parameters, base._parameters
    W, bias, a, b = of_base.get("weight"), of_base.get("bias"), of_A.get("weight"), of_B.get("weight")
    if (
        W is None
        or type(a) not in _TENSORS
        or type(b) not in _TENSORS
        or of_A["bias"] is not None
        or of_B["bias"] is not None
        or not (bias is None or type(bias) in _TENSORS)
        or hasattr(W, _PARTITIONED)
        or hasattr(a, _PARTITIONED)
        or hasattr(b, _PARTITIONED)
        or hasattr(bias, _PARTITIONED)
        or not a.layout is b.layout is W.layout is torch.strided
    ):
        return None
    constants = Constants(scaling, p)
    if type(base) is nn.Linear:
        return Plain(W, bias, a, b, constants, None) if type(W) in _TENSORS else None
    return _four_bit_plain(base, W, bias, a, b, constants)


def _four_bit_plain(
    base: Any, W: Any, bias: Tensor | None, A: Tensor, B: Tensor, constants: Constants
) -> Plain | None:
    """The state of a layer on bitsandbytes' 4-bit one, in NF4 and quantised."""
    state = getattr(W, "quant_state", None)
    if (
        type(base) not in (four_bit.classes or four_bit.find())
        or type(W) is not four_bit.weight_class
        or state is None
        or state.quant_type != "nf4"
        or not base.compute_type_is_set
        or base.compute_dtype is None
    ):
        return None
    return Plain(NF4Weight.view(W.data, state), bias, A, B, constants, base.compute_dtype)


def _runs_alone(module: Any) -> bool:
    """Whether a call of a module runs the forward of its class and nothing else."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or module._compiled_call_impl is not None
    )


def fits(layer: Any, plain: Plain, x: Tensor, casts: torch.dtype | None) -> bool:
    """Whether x and the tensors of a layer fit together, in dtypes that PEFT computes with as the
    operation does; `casts` is autocast's dtype where that is on."""
    W, bias, A, B, _, packed = plain
    device, size, shape, R = x.device, x.shape, W.shape, A.shape[0]
    return bool(
        size
        and R
        and len(shape) == 2
        and size[-1] == shape[1] > 0
        and shape[0] > 0
        and A.shape == (R, shape[1])
        and B.shape == (shape[0], R)
        and W.device == device
        and A.device == device
        and B.device == device
        and x.dtype in _COMPUTE_DTYPES
        and A.dtype in _COMPUTE_DTYPES
        and B.dtype in _COMPUTE_DTYPES
        and (packed is not None or W.dtype in _COMPUTE_DTYPES)
        and (
            bias is None
            or (
                bias.layout is torch.strided
                and bias.shape == shape[:1]
                and bias.device == device
                and bias.dtype in _COMPUTE_DTYPES
            )
        )
        and (
            casts is not None
            or (
                A.dtype is B.dtype
                and (A.dtype is x.dtype or layer.__dict__.get("cast_input_dtype_enabled", True))
                and (
                    packed in _COMPUTE_DTYPES
                    if packed is not None
                    else W.dtype is x.dtype and (bias is None or bias.dtype is x.dtype)
                )
            )
        )
    )
