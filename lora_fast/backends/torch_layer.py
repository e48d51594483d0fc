"""A layer in the torch backend: its operands in the dtypes of products, and its sum.

x Wᵀ + s · b ⊙ ((d ⊙ S) Bᵀ) + bias
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..factors import Factors
from ..nf4 import NF4Weight
from . import torch_low_rank as low_rank
from .torch_low_rank import given
from .torch_products import linear, working_dtype

_UNCHANGED = nullcontext()


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast, which would round float32 products a second time."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):
        return _UNCHANGED
    return torch.autocast(device, enabled=False)


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Tensors side by side, in the widest of their dtypes, of which autocast refuses some."""
    with without_autocast(parts[0]):
        return torch.cat(tuple(parts), dim)


def dense(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`."""
    if not isinstance(weight, NF4Weight):
        return weight if weight.dtype is dtype else weight.to(dtype)
    if weight.decoded is None:
        return weight.dequantize(dtype)
    return weight.decoded.once(dtype, lambda: weight.dequantize(dtype))


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., K] as [M, K] in `dtype`."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.dtype is dtype else rows.to(dtype)


def adapted(rows: Tensor, W: Tensor, S: Tensor | None, f: Factors, bias: Tensor | None) -> Tensor:
    """x Wᵀ + s · b ⊙ ((d ⊙ S) Bᵀ) + bias, in 16 bits the product with W last."""
    work, scaling = rows.dtype, f.constants.scaling
    bias = None if bias is None else bias.to(work)
    if S is None:
        return linear(rows, W, bias)
    Q = low_rank.expand_factor(f, S.dtype)
    if work.itemsize > 2:
        return linear(rows, W, bias).addmm_(S, Q.T, alpha=scaling)
    # With beta = 0 the first argument is not read.
    first, beta = (S.new_empty(1), 0.0) if bias is None else (bias.to(S.dtype), 1.0)
    low = torch.addmm(first, S, Q.T, beta=beta, alpha=scaling)
    return (low if S.dtype is work else low.to(work)).addmm_(rows, W.T)


def stacked(fs: Sequence[Factors], dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """The A of all layers [Σ R_i, K] in `dtype`, and the R_i."""
    if len(fs) == 1:
        A = given(fs[0].A)
        return A if A.dtype is dtype else A.to(dtype), [A.shape[0]]
    factors, ranks = [], []
    for f in fs:
        if f.A is not None:
            factors.append(f.A if f.A.dtype is dtype else f.A.to(dtype))
            ranks.append(f.A.shape[0])
    return torch.cat(factors), ranks


def row_on_a_cpu(x: Tensor, f: Factors) -> Tensor | None:
    """y of one row of x in operations that autograd records by itself, as PEFT's layer would; None
    for what takes more than those, or fewer otherwise.

    They take less of the host's time than one operation with Python in its backward pass, and of
    one row there is nothing to save. A and B are float32, which few rows are multiplied in.
    """
    weight, bias, A, B, b, d, g, constants = f
    if (
        A is None
        or A.dtype is not torch.float32
        or B is None
        or B.dtype is not torch.float32
        or not (b is d is g is None)
        or isinstance(weight, NF4Weight)
        or weight.dtype is not x.dtype
        or (bias is not None and bias.dtype is not x.dtype)
        or constants.dropout_p > 0.0
        or constants.rank_spans is not None
        or type(constants.scaling) is not float
        or torch.is_autocast_enabled("cpu")
        or working_dtype(x) is not x.dtype
    ):
        return None
    product = torch.nn.functional.linear
    wide = x if x.dtype is torch.float32 else x.to(torch.float32)
    y = torch.add(product(x, weight, bias), product(product(wide, A), B), alpha=constants.scaling)
    return y if y.dtype is x.dtype else y.to(x.dtype)
