"""The short way of a LoRA layer's forward: one plain adapter on a frozen layer, and no hooks.

Most calls of most models are of this kind, and their checks are the time of a small layer. So the
layer is read here in one function, without PEFT's properties, nn.Module's attribute lookups and a
call for each condition. Nothing of a layer is kept between calls. Whatever is not recognised here
takes the long way (fused_forward.py, lora_state.py), which knows all cases and gives the reason for
a fallback.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import four_bit
from ..base_layer.obstacles import is_eager
from ..factors import Constants, Factors
from ..four_bit.decoding import CODES
from ..geometry import Numbered, Numbers
from ..nf4 import NF4Weight
from ..operation.autograd import run
from .fused_forward import CAST

_COMPUTE_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
TENSORS = frozenset((Tensor, nn.Parameter))
# The attribute of a layer that says whether PEFT casts x to the dtype of lora_A.
CASTS_INPUT = "cast_input_dtype_enabled"
# The attribute of a parameter that DeepSpeed ZeRO-3 has partitioned.
_PARTITIONED = "ds_id"
# Of the geometries of x and layers that fit together.
_fitting = Numbers()
_without_torch_function = torch._C.DisableTorchFunctionSubclass
# A named tuple, without its own function.
_new = tuple.__new__


class Plain(NamedTuple):
    """A layer with one adapter: y = x Wᵀ + s · (drop(x) Aᵀ) Bᵀ + bias; of a 4-bit layer also the
    dtype in which it computes."""

    factors: Factors
    dtype: torch.dtype | None = None


def plain_output(layer: Any, x: Any) -> Tensor | None:
    """The output of a layer for x; None if it takes the long way."""
    if not is_eager():
        return None
    plain = read_plain(layer)
    if plain is None or type(x) not in TENSORS:
        return None
    fs, casts = (plain.factors,), autocast_dtype(x)
    fitting = geometry_if_fitting(layer, x, fs, plain.dtype, casts)
    if fitting is None:
        return None
    read = input_of(plain, x, casts)
    (y,) = run(read, fs, None, fitting if read is x else None)
    return y if plain.dtype is None else output_of(x, y, casts)


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
        or CAST in layer.__dict__
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
    if not type(A) is type(B) is nn.Linear or not _run_alone(A, B, base, dropout):
        return None
    of_A: Any = A._parameters
    of_B: Any = B._parameters
    of_base: Any = base._parameters
    W, bias = of_base.get("weight"), of_base.get("bias")
    a, b = of_A.get("weight"), of_B.get("weight")
    if (
        W is None
        or type(a) not in TENSORS
        or type(b) not in TENSORS
        or of_A["bias"] is not None
        or of_B["bias"] is not None
        or hasattr(W, _PARTITIONED)
        or hasattr(a, _PARTITIONED)
        or hasattr(b, _PARTITIONED)
        or not a.layout is b.layout is torch.strided
    ):
        return None
    if bias is not None and (
        type(bias) not in TENSORS or hasattr(bias, _PARTITIONED) or bias.layout is not torch.strided
    ):
        return None
    dtype = None
    if type(base) is not nn.Linear:
        W, dtype = _four_bit_weight(base, W)
        if W is None:
            return None
    elif type(W) not in TENSORS or W.layout is not torch.strided:
        return None
    factors = _new(Factors, (W, bias, a, b, None, None, None, _constants(scaling, p)))
    return _new(Plain, (factors, dtype))


_constants = functools.lru_cache(maxsize=1024)(Constants)


def _four_bit_weight(base: Any, W: Any) -> tuple[NF4Weight | None, torch.dtype | None]:
    """The weight of bitsandbytes' 4-bit layer, quantised, and the dtype in which it computes; None
    for any other layer."""
    state, kind = getattr(W, "quant_state", None), type(W)
    if (
        type(base) not in (four_bit.classes or four_bit.find())
        or kind is not four_bit.weight_class
        or state is None
        or state.quant_type not in CODES
        or not base.compute_type_is_set
        or base.compute_dtype is None
        or type(base).forward is not four_bit.forward
        or four_bit.library.matmul_4bit is not four_bit.product
    ):
        return None, None
    # A Params4bit answers every question in Python.
    with _without_torch_function():
        data: Tensor = W.detach()
    if data.layout is not torch.strided or not data.is_contiguous():
        return None, None
    return NF4Weight.view(data, state), base.compute_dtype


def _run_alone(*modules: Any) -> bool:
    """Whether a call of each module runs the forward of its class and nothing else."""
    for module in modules:
        own = module.__dict__
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
            or "_compiled_call_impl" in own
        ):
            return False
    return True


def is_frozen(plain: Plain) -> bool:
    """Whether the weight of a layer gets no gradient, as in groups and gated MLPs."""
    weight = plain.factors.weight
    return not isinstance(weight, Tensor) or not weight.requires_grad


def fingerprint_of(plain: Plain) -> tuple[Any, ...] | None:
    """A value that changes with everything that the output of a plain layer depends on, except x;
    None for inference tensors, which have no version counter."""
    f, dtype = plain
    W, bias, A, B, _, _, _, constants = f
    assert A is not None and B is not None
    try:
        # Without a loop, which takes half as long again.
        of_factors: tuple[Any, ...] = (
            constants, dtype,
            id(A), A.data_ptr(), A.requires_grad, A._version,
            id(B), B.data_ptr(), B.requires_grad, B._version,
        )  # fmt: skip
        if bias is not None:
            of_factors += (id(bias), bias.data_ptr(), bias.requires_grad, bias._version)
        if isinstance(W, Tensor):
            return of_factors, id(W), W.data_ptr(), W.requires_grad, W._version
        return of_factors, id(W.quant_state), W.packed.data_ptr(), W.packed._version
    except RuntimeError:  # raised by _version
        return None


def geometry_if_fitting(
    layer: Any,
    x: Tensor,
    fs: Sequence[Factors],
    dtype: torch.dtype | None,
    casts: torch.dtype | None,
) -> Numbered | None:
    """The geometry of x and plain layers, if they fit together, in dtypes that PEFT computes with
    as the operation does; None if they do not.

    `dtype` is that in which 4-bit layers compute, `casts` that of autocast where it is on. What was
    found for a geometry need not be found again.
    """
    if x.layout is not torch.strided:
        return None
    if dtype is not None and not x.is_cuda and torch.is_autocast_enabled("cuda"):
        return None
    casts_input = layer.__dict__.get(CASTS_INPUT, True)
    beside = dtype, casts, casts_input
    number, tensors = _fitting.find(beside, (x,), fs)
    if number is None:
        for f in fs:
            if not _fits(x, f, dtype, casts, casts_input):
                return None
        number = _fitting.add(beside, (x,), fs)
    return number, tensors


def _fits(
    x: Tensor,
    f: Factors,
    packed: torch.dtype | None,
    casts: torch.dtype | None,
    casts_input: bool,
) -> bool:
    W, bias, A, B, *_ = f
    assert A is not None and B is not None
    if not (x.is_cuda or x.is_cpu):
        return False
    device, size, R, shape = x.device, x.shape, A.shape[0], W.shape
    N, K = shape if len(shape) == 2 else (0, 0)
    if not (size and R and N and K and size[-1] == K):
        return False
    vectors = () if bias is None else (bias,)
    if A.shape != (R, K) or B.shape != (N, R) or any(v.shape != (N,) for v in vectors):
        return False
    for t in (W, A, B, *vectors):
        if t.device != device:
            return False
    dense = (W,) if isinstance(W, Tensor) else ()
    for t in (x, A, B, *dense, *vectors):
        if t.dtype not in _COMPUTE_DTYPES:
            return False
    if casts is not None:
        return True
    if A.dtype is not B.dtype or not (A.dtype is x.dtype or casts_input):
        return False
    if packed is not None:
        return packed in _COMPUTE_DTYPES
    return all(t.dtype is x.dtype for t in (*dense, *vectors))
