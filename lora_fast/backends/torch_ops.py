"""The torch backend: forward and backward of the equation in as few aten calls as possible.

    forward    y = g ⊙ (x Wᵀ + s · b ⊙ ((d ⊙ S) Bᵀ)) + bias         S = drop(x) Aᵀ
    backward   dX = dY (g ⊙ W) + drop'(dS A)      dg = Σ_M dY ⊙ V      dW = g ⊙ (dYᵀ x)
               and dS, dA, dB, db, dd, dbias of torch_low_rank.py

The low-rank part of y and dX is computed first and the product with W added to it, in one sum that
is rounded once: in the other order the large product would be rounded twice. torch_products.py
determines the dtype of products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..factors import Factors, Gradients, Needs, Saved
from ..nf4 import NF4Weight
from . import torch_low_rank as low_rank
from .torch_dropout import Dropout, dropout_mask
from .torch_low_rank import given
from .torch_products import rows_product, scaled_product, wide_dtype, working_dtype

__all__ = ["backward", "dropout_mask", "forward", "update_weight"]


def forward(
    x: Tensor, f: Factors, needs: Needs, mask: Tensor | None = None
) -> tuple[Tensor, Saved]:
    """y [M, N] and what the backward pass needs of S, V and dropout's mask; x is [M, K].

    The mask [M, K] is drawn here unless it is given.
    """
    dtype, work = x.dtype, working_dtype(x)
    rows, W = x.to(work), _dense(f.weight, dtype).to(work)
    S = V = dropout = None
    if f.A is not None:
        dropout = None if f.dropout_p == 0.0 else _dropout(f, x, mask)
        S = low_rank.shrink(rows, f.A, dropout, f.rank_spans)
    if f.g is None:
        y = _adapted(rows, W, S, f, f.bias)
    else:
        y, V = _gained(rows, W, S, f)
    return y.to(dtype), Saved(
        S.to(dtype) if S is not None and needs.saves_S else None,
        V.to(dtype) if V is not None and needs.saves_V else None,
        dropout.mask if dropout is not None and needs.saves_mask else None,
    )


def backward(dY: Tensor, x: Tensor | None, saved: Saved, f: Factors, needs: Needs) -> Gradients:
    """Every wanted gradient for dY [M, N]; x [M, K] and `saved` as forward left them."""
    dtype, work = dY.dtype, working_dtype(dY)
    dYw = dY.to(work)
    dropout = None if saved.mask is None else Dropout(saved.mask, f.dropout_p)
    dS = low_rank.shrunk_gradient(dYw, f) if f.A is not None and (needs.A or needs.x) else None
    found = low_rank.output_gradients(dYw, saved.S, f, needs)._asdict()
    if x is not None and (needs.A or needs.weight):
        rows = x.to(work)
        if needs.A:
            A = given(f.A)
            found["A"] = low_rank.factor_gradient(given(dS), rows, dropout).to(A.dtype)
        if needs.weight:
            dW = low_rank.times_gain(rows_product(dYw, rows), f)
            found["weight"] = dW.to(f.weight.dtype)
    if needs.x:
        W = _dense(f.weight, dtype).to(work)
        found["x"] = _input_gradient(dYw, W, dS, f, dropout).to(dtype)
    if needs.g:
        found["g"] = _gain_gradient(dY, given(saved.V)).to(given(f.g).dtype)
    return Gradients(**found)


def forward_group(
    x: Tensor, fs: Sequence[Factors], mask: Tensor | None = None
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """y [M, N_i] of layers that read the same x, their S [M, Σ R_i] side by side, the mask."""
    dtype, work = x.dtype, working_dtype(x)
    rows = x.to(work)
    dropout = None if fs[0].dropout_p == 0.0 else _dropout(fs[0], x, mask)
    A, ranks = _stacked(fs, work)
    S = low_rank.shrink(rows, A, dropout)
    ys = [
        _adapted(rows, _dense(f.weight, dtype).to(work), S_i, f, f.bias).to(dtype)
        for f, S_i in zip(fs, S.split(ranks, dim=1), strict=True)
    ]
    return ys, S.to(dtype), None if dropout is None else dropout.mask


def backward_group(
    dYs: Sequence[Tensor],
    x: Tensor | None,
    S: Tensor,
    mask: Tensor | None,
    fs: Sequence[Factors],
    needs: list[Needs],
) -> list[Gradients]:
    """The gradients of every layer of a group; that of x, their sum, is with the first."""
    dtype, work = dYs[0].dtype, working_dtype(dYs[0])
    A, ranks = _stacked(fs, work)
    dropout = None if mask is None else Dropout(mask, fs[0].dropout_p)
    dYs = [dY.to(work) for dY in dYs]
    grads = [
        low_rank.output_gradients(dY, S_i, f, need)
        for dY, S_i, f, need in zip(dYs, S.split(ranks, dim=1), fs, needs, strict=True)
    ]
    dS = torch.cat([low_rank.shrunk_gradient(dY, f) for dY, f in zip(dYs, fs, strict=True)], dim=1)
    if any(need.x for need in needs):
        dX = low_rank.input_gradient(dS, A, dropout)
        for dY, f in zip(dYs, fs, strict=True):
            dX.addmm_(dY, _dense(f.weight, dtype).to(work))
        grads[0] = grads[0]._replace(x=dX.to(dtype))
    if x is not None and any(need.A for need in needs):
        dAs = low_rank.factor_gradient(dS, x.to(work), dropout).split(ranks)
        grads = [
            grad._replace(A=dA.to(given(f.A).dtype)) if need.A else grad
            for grad, dA, f, need in zip(grads, dAs, fs, needs, strict=True)
        ]
    return grads


# Elements of V widened at a time on a CPU, few enough to stay in the cache.
_BLOCK_ELEMENTS = 1 << 18
# Elements of the widened rows of a weight that update_weight holds at a time: 16 MiB in float32.
_UPDATE_ELEMENTS = 1 << 22


def update_weight(
    W: Tensor,
    out: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    b: Tensor | None,
    d: Tensor | None,
    g: Tensor | None,
    scaling: float,
) -> None:
    """out [N, K] ← round(g ⊙ (W + s · (b ⊙ (B d)) A)), a few rows at a time; out may be W."""
    wide = wide_dtype(W.dtype)
    A = None if A is None else A.to(wide)
    step = max(1, _UPDATE_ELEMENTS // max(1, W.shape[1]))
    for start in range(0, W.shape[0], step):
        rows = slice(start, start + step)
        total = W[rows].to(wide, copy=True)
        if A is not None and B is not None:
            left = B[rows].to(wide)
            left = left if d is None else left * d
            left = left if b is None else left * b[rows].unsqueeze(1)
            # The product alone first: adding −Δ then removes exactly what Δ added.
            total.add_(left @ A, alpha=scaling)
        if g is not None:
            total.mul_(g[rows].unsqueeze(1))
        out[rows].copy_(total)


def row_norms(weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """‖W_i + s (B A)_i‖₂ [N] in float32, without an N × K product.

    ‖W_i + s (B A)_i‖² = ‖W_i‖² + 2s (W Aᵀ)_i · B_i + s² B_i (A Aᵀ) B_iᵀ

    If B A is zero it equals the norm that m was initialised with, so g is 1 before training.
    """
    W = _dense(weight, torch.float32)
    lengths = torch.linalg.vector_norm(W, dim=1)
    a, b = A.float(), B.float()
    cross = torch.linalg.vecdot(W @ a.T, b)
    delta = torch.linalg.vecdot(b @ (a @ a.T), b)
    change = 2.0 * scaling * cross + scaling * scaling * delta
    # Rounding can make a row that cancels negative.
    changed = (lengths * lengths + change).clamp_(min=0.0).sqrt_()
    return torch.where(change == 0.0, lengths, changed)


def _adapted(rows: Tensor, W: Tensor, S: Tensor | None, f: Factors, bias: Tensor | None) -> Tensor:
    """x Wᵀ + s · b ⊙ ((d ⊙ S) Bᵀ) + bias: the low-rank part first, the product with W on top."""
    bias = None if bias is None else bias.to(rows.dtype)
    if S is None:
        return torch.nn.functional.linear(rows, W, bias)
    Q = low_rank.expand_factor(f, rows.dtype)
    if bias is None:
        return scaled_product(S, Q.T, f.scaling).addmm_(rows, W.T)
    return torch.addmm(bias, S, Q.T, alpha=f.scaling).addmm_(rows, W.T)


def _gained(rows: Tensor, W: Tensor, S: Tensor | None, f: Factors) -> tuple[Tensor, Tensor]:
    """y = g ⊙ V + bias, and V."""
    g, bias = given(f.g), f.bias
    if rows.dtype.itemsize > 2:
        y, g = _adapted(rows, W, S, f, bias), g.to(rows.dtype)
        if bias is None:
            return y * g, y
        V = y - bias
        # By g − 1, so that a gain of 1 gives the same bits as no gain.
        return torch.addcmul(y, V, g - 1.0), V
    # In 16 bits V would be lost beside a large bias.
    V = _adapted(rows, W, S, f, None)
    return _times(V, g, bias), V


def _input_gradient(
    dY: Tensor, W: Tensor, dS: Tensor | None, f: Factors, dropout: Dropout | None
) -> Tensor:
    """dX = dY (g ⊙ W) + drop'(dS A)."""
    if f.g is not None:
        # g is put on the smaller one of dY [M, N] and W [N, K].
        if dY.shape[0] < W.shape[1]:
            dY = _times(dY, f.g)
        else:
            W = _times(W, f.g.unsqueeze(1))
    if dS is None:
        return dY @ W
    return low_rank.input_gradient(dS, given(f.A).to(W.dtype), dropout).addmm_(dY, W)


def _gain_gradient(dY: Tensor, V: Tensor) -> Tensor:
    """dg = Σ_M dY ⊙ V, not below float32."""
    wide = wide_dtype(dY.dtype)
    total = dY.new_zeros(dY.shape[1], dtype=wide)
    for rows in _blocks(dY):
        total += torch.linalg.vecdot(dY[rows].to(wide), V[rows].to(wide), dim=0)
    return total


def _times(matrix: Tensor, g: Tensor, bias: Tensor | None = None) -> Tensor:
    """g ⊙ matrix + bias for g [N] or [M, 1], rounded once; a g close to 1 is not rounded to it."""
    out = torch.empty_like(matrix)
    g = g.to(wide_dtype(matrix.dtype))
    for rows in _blocks(matrix):
        gain = g if g.dim() == 1 else g[rows]
        if bias is None:
            torch.mul(matrix[rows], gain, out=out[rows])
        else:
            torch.addcmul(bias, matrix[rows], gain, out=out[rows])
    return out


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """A few rows at a time on a CPU, all at once elsewhere."""
    M, N = matrix.shape
    step = max(1, _BLOCK_ELEMENTS // N) if matrix.device.type == "cpu" else max(1, M)
    return (slice(start, start + step) for start in range(0, M, step))


def _dropout(f: Factors, x: Tensor, mask: Tensor | None) -> Dropout:
    if mask is None:
        M, K = x.shape
        mask = dropout_mask(f.dropout_seed, M, K, f.dropout_p, x.device)
    return Dropout(mask, f.dropout_p)


def _stacked(fs: Sequence[Factors], dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """The A of all layers of a group [Σ R_i, K], and the R_i."""
    factors = [f.A.to(dtype) for f in fs if f.A is not None]
    return torch.cat(factors), [A.shape[0] for A in factors]


def _dense(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    return weight.dequantize(dtype) if isinstance(weight, NF4Weight) else weight.to(dtype)
