"""The low rank on the output y of an opaque base in the torch backend.

    y ← y + s · b ⊙ ((d ⊙ S) Bᵀ) + bias          S = drop(x) Aᵀ

Where products have the dtype of y, product and sum are one call, rounded once; elsewhere a few
rows of the product, not rounded, are added to y at a time. Of dropout the seed is saved, and its
mask drawn again in backward: PEFT saves two matrices of M × K elements, this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..factors import Factors, Gradients, Needs, Saved
from . import torch_low_rank as low_rank
from .protocol import shaped_as
from .torch_dropout import Dropout, dropout_mask
from .torch_layer import rows_of
from .torch_low_rank import given
from .torch_products import product_dtypes, scaled_product

# Elements of the low-rank part at a time on a CPU, few enough to stay in the cache.
_BLOCK_ELEMENTS = 1 << 18


def add_low_rank(
    y: Tensor | None, x: Tensor, f: Factors, needs: Needs, *, in_place: bool
) -> tuple[Tensor, Saved]:
    """As the protocol has it."""
    dtype, (_, narrow) = x.dtype, product_dtypes(x)
    rows, A = rows_of(x, narrow), given(f.A)
    dropout = _dropout(f, rows.shape[0], rows.shape[1], rows.device)
    S = low_rank.shrink(rows, A, dropout, f.constants.rank_spans)
    if y is None:
        out = shaped_as(x, _part(S, low_rank.expand_factor(f, S.dtype), f).to(dtype))
    else:
        out = _added(y, S, f, in_place=in_place)
    return out, Saved(S.to(dtype) if needs.saves_S else None)


def low_rank_gradients(
    dY: Tensor, x: Tensor | None, saved: Saved, f: Factors, needs: Needs
) -> Gradients:
    """As the protocol has it."""
    A, dtype, narrow = given(f.A), dY.dtype, product_dtypes(dY)[1]
    rows, dX, dropout = rows_of(dY, narrow), None, None
    dS = low_rank.shrunk_gradient(rows, f) if needs.x or needs.A else None
    found = low_rank.output_gradients(rows, saved.S, f, needs)
    if needs.x or needs.A:
        dropout = _dropout(f, rows.shape[0], A.shape[1], rows.device)
    if needs.A and x is not None:
        dA = low_rank.factor_gradient(given(dS), rows_of(x, narrow), dropout)
        found["A"] = dA.to(A.dtype)
    if needs.x:
        dX = low_rank.input_gradient(given(dS), A.to(narrow), dropout).to(dtype)
        dX = dX.view(*dY.shape[:-1], A.shape[1])
    return Gradients(x=dX, **found)


def _added(y: Tensor, S: Tensor, f: Factors, *, in_place: bool) -> Tensor:
    Q, (M, N) = low_rank.expand_factor(f, S.dtype), (S.shape[0], y.shape[-1])
    if in_place:
        out = total = y.view(M, N)
    else:
        total = y.reshape(M, N)
        if y.dtype is S.dtype and f.bias is None:
            added = torch.addmm(total, S, Q.T, alpha=f.constants.scaling)
            return shaped_as(y, added)
        out = torch.empty_like(total, memory_format=torch.contiguous_format)
    if y.dtype is S.dtype and f.bias is None:
        out.addmm_(S, Q.T, alpha=f.constants.scaling)
    else:
        step = max(1, _BLOCK_ELEMENTS // N) if y.device.type == "cpu" else max(1, M)
        for start in range(0, M, step):
            block = slice(start, start + step)
            torch.add(total[block], _part(S[block], Q, f), out=out[block])
    return y if in_place else shaped_as(y, out)


def _part(S: Tensor, Q: Tensor, f: Factors) -> Tensor:
    """s · S Qᵀ + bias in the dtype of S."""
    if f.bias is None:
        return scaled_product(S, Q.T, f.constants.scaling)
    return torch.addmm(f.bias.to(S.dtype), S, Q.T, alpha=f.constants.scaling)


def _dropout(f: Factors, M: int, K: int, device: torch.device) -> Dropout | None:
    """The dropout of x [M, K]."""
    p = f.constants.dropout_p
    if p == 0.0:
        return None
    return Dropout(dropout_mask(f.constants.dropout_seed, M, K, p, device), p)
