"""Folding an adapter into the weight of its frozen base layer, and taking it out again.

W' = W + Δ, in float32, rounded to W's dtype or quantised to NF4 once
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn

from .base_linear import is_four_bit
from .nf4 import NF4Weight


@torch.no_grad()
def add_to_weight(base: Any, delta: Tensor) -> nn.Parameter:
    """Give `base` the weight W + delta [N, K] and return its old weight, which is not modified.

    NF4 is quantised again with the same block size and nesting. ValueError if the sum is not
    finite; `base` is then as it was.
    """
    old = base.weight
    four_bit = is_four_bit(base)
    W = NF4Weight.from_params4bit(old).dequantize(torch.float32) if four_bit else old
    merged = W.to(delta.dtype) + delta
    if not four_bit:
        merged = merged.to(old.dtype)
    if not torch.isfinite(merged).all():
        raise ValueError("the merged weight must be finite, got NaN or infinity")
    if four_bit:
        _set_four_bit(base, _quantised_like(old, merged))
    else:
        base.weight = nn.Parameter(merged, requires_grad=False)
    return old


def restore_weight(base: Any, weight: nn.Parameter) -> None:
    """Put back what :func:`add_to_weight` returned, on the device and in the dtype of `base`."""
    now = base.weight
    if is_four_bit(base):
        _set_four_bit(base, weight if weight.device == now.device else weight.to(now.device))
    elif (weight.device, weight.dtype) == (now.device, now.dtype):
        base.weight = weight
    else:
        base.weight = nn.Parameter(weight.to(now.device, now.dtype), requires_grad=False)


def _quantised_like(weight: Any, dense: Tensor) -> Params4bit:
    state = weight.quant_state
    packed = Params4bit(
        dense,
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=weight.quant_storage,
    ).to(dense.device)
    # Quantised from float32, but still a weight of the dtype it had.
    packed.quant_state.dtype = state.dtype
    return packed


def _set_four_bit(base: Any, weight: Any) -> None:
    base.weight = weight
    base.quant_state = weight.quant_state
