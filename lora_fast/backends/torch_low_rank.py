"""The low-rank branch in the torch backend: S, dS, and the gradients computed from them.

    S = drop(x) Aᵀ            Q = b dᵀ ⊙ B            dS = s · dY (g ⊙ Q)
    dA = dSᵀ drop(x)          drop'(dS A), the branch's part of dX
    T = s · g ⊙ (dYᵀ S)       dB = b dᵀ ⊙ T    db = rowsum(B ⊙ T dᵀ)    dd = colsum(b B ⊙ T)

x, dY and the products with them share one dtype (torch_products.py), which for few rows is float32;
factors have their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..factors import Factors, Needs
from .torch_dropout import Dropout
from .torch_products import (
    add_product,
    linear,
    operand,
    product,
    rows_product,
    scaled_product,
    wide_dtype,
)


def shrink(
    x: Tensor, A: Tensor, dropout: Dropout | None, rank_spans: Tensor | None = None
) -> Tensor:
    """S = drop(x) Aᵀ [M, R], rounded once to the dtype of x."""
    A = A if A.dtype is x.dtype else A.to(x.dtype)
    S = linear(x, A) if dropout is None else dropout.shrink(x, A)
    return S if rank_spans is None else _in_spans(S, rank_spans)


def expand_factor(f: Factors, dtype: torch.dtype) -> Tensor:
    """Q = b dᵀ ⊙ B [N, R], rounded once to `dtype`; the scaling s is applied to the product."""
    B = f.B
    assert B is not None
    if f.d is None and f.b is None:
        return B if B.dtype is dtype else B.to(dtype)
    B = B.to(wide_dtype(dtype))
    B = B if f.d is None else B * f.d
    return (B if f.b is None else B * f.b.unsqueeze(1)).to(dtype)


def times_gain(matrix: Tensor, f: Factors) -> Tensor:
    """g ⊙ a matrix of N rows, in its dtype."""
    return matrix if f.g is None else (matrix * f.g.unsqueeze(1)).to(matrix.dtype)


def shrunk_gradient(dY: Tensor, f: Factors) -> Tensor:
    """dS = s · dY (g ⊙ Q) [M, R]: in bfloat16 where that is dY's dtype, else not rounded."""
    dtype, c, scaling = dY.dtype, None, f.constants.scaling
    if f.g is None and dtype is not torch.float16:
        Q = expand_factor(f, dtype)
    else:
        Q, c = operand(times_gain(expand_factor(f, wide_dtype(dtype)), f), dtype, dim=0)
    if c is not None:
        dS = product(dY, Q).mul_(c * scaling)
    elif dtype.itemsize > 2:
        dS = add_product(None, dY, Q)
        dS = dS if scaling == 1.0 else dS.mul_(scaling)
    else:
        dS = scaled_product(dY, Q, scaling)
    spans = f.constants.rank_spans
    return dS if spans is None else _in_spans(dS, spans)


def input_gradient(dS: Tensor, A: Tensor, dropout: Dropout | None) -> Tensor:
    """drop'(dS A) [M, K], in the dtype of A."""
    dS, c = operand(dS, A.dtype, dim=1)
    dX = add_product(None, dS, A) if dropout is None else dropout.input_gradient(dS, A)
    return dX if c is None else dX.mul_(c)


def factor_gradient(
    dS: Tensor, x: Tensor, dropout: Dropout | None, dtype: torch.dtype | None = None
) -> Tensor:
    """dA = dSᵀ drop(x) [R, K], not rounded below float32; without dropout it may be in `dtype`."""
    dS, c = operand(dS, x.dtype, dim=0)
    if dropout is None:
        dA = rows_product(dS, x, dtype=dtype if c is None else None)
    else:
        dA = x.new_zeros(dS.shape[1], x.shape[1], dtype=wide_dtype(x.dtype))
        for rows, kept in dropout.kept(x):
            dA += rows_product(dS[rows], kept)
        dA *= dropout.keep_scale
    return dA if c is None else dA.mul_(c.T)


def output_gradients(
    dY: Tensor, S: Tensor | None, f: Factors, needs: Needs
) -> dict[str, Tensor | None]:
    """dbias, dB, db and dd by the names of the factors; sums are not below float32."""
    found: dict[str, Tensor | None] = {}
    if needs.bias and f.bias is not None:
        found["bias"] = dY.sum(0, dtype=wide_dtype(dY.dtype)).to(f.bias.dtype)
    if S is None or f.B is None or not (needs.B or needs.b or needs.d):
        return found
    S = S if S.dtype is dY.dtype else S.to(dY.dtype)
    is_dB = f.g is None and f.b is None and f.d is None
    T = rows_product(
        dY, S, f.constants.scaling, dtype=f.B.dtype if is_dB else None, cancels=needs.b or needs.d
    )
    T = T if f.g is None else times_gain(T, f)
    if needs.B:
        dB = T if f.d is None else T * f.d
        dB = dB if f.b is None else dB * f.b.unsqueeze(1)
        found["B"] = dB if dB.dtype is f.B.dtype else dB.to(f.B.dtype)
    if needs.b or needs.d:
        # Sums of N · R products with cancellation: float64 costs nothing at this size.
        TB = T.double() * f.B
        if needs.b and f.b is not None:
            found["b"] = (TB.sum(1) if f.d is None else TB @ f.d.double()).to(f.b.dtype)
        if needs.d and f.d is not None:
            found["d"] = (TB.sum(0) if f.b is None else f.b.double() @ TB).to(f.d.dtype)
    return found


def given(factor: Tensor | None) -> Tensor:
    assert factor is not None
    return factor


def _in_spans(S: Tensor, rank_spans: Tensor) -> Tensor:
    """S, in place, with zeros in columns that the row's sample does not use."""
    if S.shape[0] == 0:
        return S
    columns = torch.arange(S.shape[1], device=S.device)
    used = (columns >= rank_spans[:, :1]) & (columns < rank_spans[:, 1:])
    samples = used.shape[0]
    S.view(samples, -1, S.shape[1]).masked_fill_(~used.unsqueeze(1), 0.0)
    return S
