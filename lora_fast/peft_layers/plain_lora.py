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
from ..geometry import Geometry, of_plain
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
    """A layer with one adapter: y = x Wᵀ + s · (drop(x) Aᵀ) Bᵀ + bias; of a 4-bit layer the packed
    weight, what bitsandbytes knows of it, and the dtype in which it computes."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    constants: Constants
    quant_state: Any = None
    dtype: torch.dtype | None = None

    def factors(self) -> Factors:
        weight, bias, A, B, constants, state, _ = self
        W = weight if state is None else NF4Weight.view(weight.data, state)
        return Factors(W, bias, A, B, None, None, None, constants)


def plain_output(layer: Any, x: Any) -> Tensor | None:
    """The output of a layer for x; None if it takes the long way."""
    if torch.compiler.is_compiling() or environment_obstacle() is not None:
        return None
    plain = read_plain(layer)
    if plain is None or type(x) not in _TENSORS:
        return None
    casts, geometry = autocast_dtype(x), None
    W, bias, A, B, constants, state, _ = plain
    if state is None and x.layout is torch.strided:
        geometry = of_plain(x, W, bias, A, B, constants)
    if not fits(layer, plain, x, casts, geometry):
        return None
    read = input_of(plain, x, casts)
    (y,) = run(read, (plain.factors(),), None, geometry if read is x else None)
    return y if state is None else output_of(x, y, casts)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast on x's device, None where it is off."""
    kind = "cuda" if x.is_cuda else "cpu"
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def input_of(plain: Plain, x: Tensor, casts: torch.dtype | None) -> Tensor:
    """x in the dtype in which a layer computes: autocast's, a 4-bit layer's own, or x's."""
    wanted = casts or plain.dtype
    return x if wanted is None or x.dtype is wanted else x.to(wanted)


def output_of(x: Tensor, y: Tensor, casts: torch.dtype | None) -> Tensor:
    """y as a 4-bit layer returns it: in the dtype of x, and under CUDA's autocast at least in that
    of autocast."""
    dtype = x.dtype if casts is None or not x.is_cuda else torch.promote_types(x.dtype, casts)
    return y if y.dtype is dtype else y.to(x.dtype).to(dtype)


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
    of_A: Any = A._parameters
    of_B: Any = B._parameters
    of_base: Any = base._parameters
    W, bias, a, b = (
        of_base.get("weight"),
        of_base.get("bias"),
        of_A.get("weight"),
        of_B.get("weight"),
    )
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
        or not (bias is None or bias.layout is torch.strided)
    ):
        return None
    constants = Constants(scaling, p)
    if type(base) is nn.Linear:
        return Plain(W, bias, a, b, constants) if type(W) in _TENSORS else None
    return _four_bit_plain(base, W, bias, a, b, constants)


def _four_bit_plain(
    base: Any, W: Any, bias: Tensor | None, A: Tensor, B: Tensor, constants: Constants
) -> Plain | None:
    """The state of a layer on bitsandbytes' 4-bit one, in NF4 and quantised."""
    weight, state = W, getattr(W, "quant_state", None)
    if (
        type(base) not in (four_bit.classes or four_bit.find())
        or type(weight) is not four_bit.weight_class
        or state is None
        or state.quant_type != "nf4"
        or not base.compute_type_is_set
        or base.compute_dtype is None
    ):
        return None
    return Plain(W, bias, A, B, constants, state, base.compute_dtype)


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


def fingerprint_of(plain: Plain) -> tuple[Any, ...] | None:
    """A value that changes with everything that the output of a plain layer depends on, except x;
    None for inference tensors, which have no version counter."""
    W, bias, A, B, constants, state, dtype = plain
    found: list[Any] = [constants, id(state), dtype]
    try:
        for t in (W, A, B) if bias is None else (W, A, B, bias):
            found += (id(t), t.data_ptr(), t.requires_grad, t._version)
    except RuntimeError:  # raised by _version
        return None
    return tuple(found)


def fits(
    layer: Any,
    plain: Plain,
    x: Tensor,
    casts: torch.dtype | None,
    geometry: Geometry | None = None,
) -> bool:
    """Whether x and the tensors of a layer fit together, in dtypes that PEFT computes with as the
    operation does; `casts` is autocast's dtype where that is on. What was found for a geometry need
    not be found again."""
    casts_input = layer.__dict__.get("cast_input_dtype_enabled", True)
    if geometry is None:
        return _fits(plain, x, casts, casts_input)
    asked = (geometry, casts, casts_input)
    if asked in _fitting:
        return True
    found = _fits(plain, x, casts, casts_input)
    if found:
        if len(_fitting) >= _MOST:
            _fitting.clear()
        _fitting.add(asked)
    return found


def _fits(plain: Plain, x: Tensor, casts: torch.dtype | None, casts_input: bool) -> bool:
    W, bias, A, B, _, state, packed = plain
    if not (x.is_cuda or x.is_cpu) or x.layout is not torch.strided:
        return False
    if packed is not None and not x.is_cuda and torch.is_autocast_enabled("cuda"):
        return False
    device, size, R = x.device, x.shape, A.shape[0]
    shape = W.shape if state is None else state.shape
    N, K = shape if len(shape) == 2 else (0, 0)
    if not (size and R and N and K and size[-1] == K):
        return False
    vectors = () if bias is None else (bias,)
    if A.shape != (R, K) or B.shape != (N, R) or any(v.shape != (N,) for v in vectors):
        return False
    for t in (W, A, B, *vectors):
        if t.device != device:
            return False
    dense = () if packed is not None else (W,)
    for t in (x, A, B, *dense, *vectors):
        if t.dtype not in _COMPUTE_DTYPES:
            return False
    if casts is not None:
        return True
    if A.dtype is not B.dtype or not (A.dtype is x.dtype or casts_input):
        return False
    if packed is not None:
        return packed in _COMPUTE_DTYPES
    return all(t.dtype is x.dtype for t in (W, *vectors))
