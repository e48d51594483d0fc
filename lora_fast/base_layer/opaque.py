"""A base layer that computes its output by itself: 8 bits, GPTQ, AWQ, HQQ, torchao, FP8, a
subclass of nn.Linear, a layer with hooks or a replaced forward, …

    y = base(x) + s · (drop(x) Aᵀ) Bᵀ + bias

The base is called as PEFT calls it, so its output has PEFT's bits; only what is added to it is
computed here. Nothing is asked of its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..factors import Factors
from ..operation.low_rank import add_low_rank
from .int8 import DecodedInt8
from .obstacles import COMPUTE_DTYPES, PLAIN_TENSORS, module_obstacle, tensor_obstacle

# Classes whose forward returns memory that nothing else reads, later or in backward.
_FRESH_OUTPUTS = frozenset(
    {
        ("bitsandbytes.nn.modules", "Linear4bit"),
        ("bitsandbytes.nn.modules", "Linear8bitLt"),
        ("hqq.core.quantize", "HQQLinear"),
    }
)


def input_obstacle(
    x: Any, adapters: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]
) -> str | None:
    """Why the low rank of the A [R, K], B [N, R], bias [N] and d [R] in `adapters` cannot be
    computed for x."""
    if not isinstance(x, Tensor):
        return f"x is {type(x).__name__}"
    found = tensor_obstacle(x, "x")
    if found is not None:
        return found
    for A, B, *vectors in adapters:
        if x.dim() == 0 or x.shape[-1] != A.shape[1] or 0 in A.shape or 0 in B.shape:
            return "shape of x"
        if B.shape != (adapters[0][1].shape[0], A.shape[0]):
            return "shapes of lora_A and lora_B"
        for t in (x, A, B, *(v for v in vectors if v is not None)):
            if t.device != x.device:
                return "tensors on different devices"
            if t.dtype not in COMPUTE_DTYPES:
                return f"dtype {str(t.dtype).removeprefix('torch.')}"
    return None


def adapted_output(base: Any, x: Tensor, layers: Sequence[Factors], *, promotes: bool) -> Tensor:
    """base(x) plus the low rank of each of `layers`, whose weights are not read.

    The result has the dtype of base(x); with `promotes`, at least that of CUDA's autocast. Call it
    only when :func:`input_obstacle` finds nothing.
    """
    y = base(x)
    read = x
    if torch.is_autocast_enabled(x.device.type):
        read = x.to(torch.get_autocast_dtype(x.device.type))
    fresh = is_fresh(base)
    for f in layers:
        y = _sum(y, read, f, fresh=fresh)
    if promotes and torch.is_autocast_enabled():
        return y.to(torch.promote_types(y.dtype, torch.get_autocast_dtype("cuda")))
    return y


def is_fresh(base: Any) -> bool:
    """Whether a call of `base` returns memory that nothing else reads."""
    kind = type(base)
    if kind is DecodedInt8:
        return True
    known = (kind.__module__, kind.__qualname__) in _FRESH_OUTPUTS
    return known and module_obstacle(base, "base layer", kind) is None


def _sum(y: Any, x: Tensor, f: Factors, *, fresh: bool) -> Tensor:
    N = f.B.shape[0] if f.B is not None else 0
    fits = (
        type(y) in PLAIN_TENSORS
        and y.shape == (*x.shape[:-1], N)
        and y.dtype in COMPUTE_DTYPES
        and y.device == x.device
        and y.layout is torch.strided
    )
    if not fits:
        # The sum, or its error, is that of y's own class.
        part: Tensor = add_low_rank(None, x, f)
        return (y + part).to(y.dtype)
    writable = fresh and not y._is_view() and y.is_contiguous() and y is not x
    return add_low_rank(y, x, f, in_place=writable and not (y.is_leaf and y.requires_grad))
