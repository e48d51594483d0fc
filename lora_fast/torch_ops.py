"""The torch backend: forward and backward of the equation in as few aten calls as it takes.

    forward    S = drop(x) Aᵀ        y = g ⊙ (x Wᵀ + s · b ⊙ ((d ⊙ S) Bᵀ)) + bias
    backward   Q = s · (g b) dᵀ ⊙ B      dS = dY Q      dX = dY (g ⊙ W) + drop'(dS A)
               dA = dSᵀ drop(x)      dW = g ⊙ (dYᵀ x)
               T = g ⊙ (dYᵀ S) [N, R]      dB = s · b dᵀ ⊙ T      db = s · rowsum(B ⊙ T dᵀ)
               dd = s · colsum(b B ⊙ T)    dg = Σ_M dY ⊙ V   dbias = Σ_M dY

Products accumulate in float32, S is rounded once to the compute dtype. A CPU without bfloat16
instructions multiplies 16-bit operands as float32 (the same products, many times faster).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .factors import Factors, Gradients, Needs, Saved
from .nf4 import NF4Weight
from .torch_dropout import Dropout, dropout_mask

__all__ = ["backward", "dropout_mask", "forward", "update_weight"]


def forward(
    x: Tensor, f: Factors, needs: Needs, mask: Tensor | None = None
) -> tuple[Tensor, Saved]:
    """y [M, N] and what the backward pass needs of S, V and dropout's mask; x is [M, K].

    The mask [M, K] is drawn here unless it is given.
    """
    dtype, work = x.dtype, _working_dtype(x)
    rows = x.to(work)
    weight = _dense(f.weight, dtype).to(work)
    bias = None if f.bias is None else f.bias.to(work)
    y = torch.nn.functional.linear(rows, weight, bias)
    S = dropout = None
    if f.A is not None and f.B is not None:
        dropout = _dropout(f, x, mask)
        S = _shrink(rows, f, dtype, dropout)
        y.addmm_(S.to(work), _expand_factor(f, dtype).to(work).T, alpha=f.scaling)
    saved_V = None
    if f.g is not None:
        gain = f.g.to(work)
        V = y if bias is None else y - bias
        saved_V = V.to(dtype) if needs.saves_V else None
        # By g − 1, so that a gain of 1 leaves the bits of the layer without it.
        y = V * gain if bias is None else torch.addcmul(y, V, gain - 1.0)
    mask = dropout.mask if dropout is not None and needs.saves_mask else None
    return y.to(dtype), Saved(S if needs.saves_S else None, saved_V, mask)


def backward(dY: Tensor, x: Tensor | None, saved: Saved, f: Factors, needs: Needs) -> Gradients:
    """Every wanted gradient for dY [M, N]; x [M, K] and `saved` as forward left them."""
    dtype, work = dY.dtype, _working_dtype(dY)
    dYw = dY.to(work)
    xw = None if x is None else x.to(work)
    dropout = None if saved.mask is None else Dropout(saved.mask, f.dropout_p)
    dS = _shrunk_gradient(dYw, f, dtype) if f.A is not None and (needs.A or needs.x) else None
    grads = _output_gradients(dYw, saved.S, f, needs)
    if needs.weight and xw is not None:
        grads = grads._replace(weight=_times_gain(_product(dYw.T, xw), f).to(_weight_dtype(f)))
    return grads._replace(
        x=_input_gradient(dYw, dS, f, dtype, dropout) if needs.x else None,
        A=_factor_gradient(dS, xw, f, dropout) if needs.A and xw is not None else None,
        g=_gain_gradient(dY, saved.V, f) if needs.g else None,
    )


def forward_group(
    x: Tensor, fs: Sequence[Factors], mask: Tensor | None = None
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """y [M, N_i] of layers that read the same x, their S [M, Σ R_i] side by side, the mask."""
    dtype, work = x.dtype, _working_dtype(x)
    rows = x.to(work)
    A = torch.cat([_given(f.A).to(dtype) for f in fs]).to(work)
    dropout = _dropout(fs[0], x, mask)
    S = (rows @ A.T if dropout is None else dropout.shrink(rows, A)).to(dtype)
    ys = []
    for f, S_i in zip(fs, S.split([_given(f.A).shape[0] for f in fs], dim=1), strict=True):
        bias = None if f.bias is None else f.bias.to(work)
        y = torch.nn.functional.linear(rows, _dense(f.weight, dtype).to(work), bias)
        y.addmm_(S_i.to(work), _expand_factor(f, dtype).to(work).T, alpha=f.scaling)
        ys.append(y.to(dtype))
    return ys, S, None if dropout is None else dropout.mask


def backward_group(
    dYs: Sequence[Tensor],
    x: Tensor | None,
    S: Tensor,
    mask: Tensor | None,
    fs: Sequence[Factors],
    needs: list[Needs],
) -> list[Gradients]:
    """The gradients of every layer of a group; that of x, their sum, is with the first."""
    dropout = None if mask is None else Dropout(mask, fs[0].dropout_p)
    dtype, work = dYs[0].dtype, _working_dtype(dYs[0])
    ranks = [_given(f.A).shape[0] for f in fs]
    dX: Tensor | None = None
    dSs, grads = [], []
    for dY, S_i, f, need in zip(dYs, S.split(ranks, dim=1), fs, needs, strict=True):
        dYw = dY.to(work)
        dSs.append(_shrunk_gradient(dYw, f, dtype))
        if need.x:
            W = _dense(f.weight, dtype).to(work)
            dX = dYw @ W if dX is None else dX.addmm_(dYw, W)
        grads.append(_output_gradients(dYw, S_i, f, need))
    dS = torch.cat(dSs, dim=1).to(work)
    if dX is not None:
        A = torch.cat([_given(f.A).to(dtype) for f in fs]).to(work)
        if dropout is None:
            dX.addmm_(dS, A)
        else:
            dropout.add_input_gradient(dX, dS, A)
        grads[0] = grads[0]._replace(x=dX.to(dtype))
    if x is not None and any(need.A for need in needs):
        dAs = _kept_product(dS, x.to(work), dropout).split(ranks)
        for i, (f, need, dA) in enumerate(zip(fs, needs, dAs, strict=True)):
            if need.A:
                grads[i] = grads[i]._replace(A=dA.to(_given(f.A).dtype))
    return grads


def _given(factor: Tensor | None) -> Tensor:
    assert factor is not None
    return factor


# Elements of dY ⊙ V that the gradient of g forms at a time on a CPU.
_GAIN_ELEMENTS = 1 << 20
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
    wide = torch.promote_types(W.dtype, torch.float32)
    A = None if A is None else A.to(wide)
    step = max(1, _UPDATE_ELEMENTS // max(1, W.shape[1]))
    for start in range(0, W.shape[0], step):
        rows = slice(start, start + step)
        total = W[rows].to(wide, copy=True)
        if A is not None and B is not None:
            left = B[rows].to(wide)
            left = left if d is None else left * d
            left = left if b is None else left * b[rows].unsqueeze(1)
            # The product first, by itself: adding −Δ then takes out exactly what Δ brought.
            total.add_(left @ A, alpha=scaling)
        if g is not None:
            total.mul_(g[rows].unsqueeze(1))
        out[rows].copy_(total)


class NormState(NamedTuple):
    """What :func:`row_norms` found, and for which A, B and s."""

    lengths: Tensor
    A: Tensor
    B: Tensor
    scaling: float
    norms: Tensor


def row_norms(
    weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float, state: Any
) -> tuple[Tensor, NormState]:
    """‖W_i + s (B A)_i‖₂ [N] in float32, without an N × K product.

    ‖W_i + s (B A)_i‖² = ‖W_i‖² + 2s (W Aᵀ)_i · B_i + s² B_i (A Aᵀ) B_iᵀ

    Where that adds nothing it is the length that m was set to, so that g is 1 before training.
    """
    known = state if isinstance(state, NormState) else None
    # On a GPU the comparison would wait for it; there the norms are formed at every call.
    if known is not None and A.device.type == "cpu" and _same(known, A, B, scaling):
        return known.norms, known
    W = _dense(weight, torch.float32)
    lengths = torch.linalg.vector_norm(W, dim=1) if known is None else known.lengths
    a, b = A.float(), B.float()
    cross = torch.linalg.vecdot(W @ a.T, b)
    delta = torch.linalg.vecdot(b @ (a @ a.T), b)
    change = 2.0 * scaling * cross + scaling * scaling * delta
    # Rounding can take a row that cancels below zero.
    changed = (lengths * lengths + change).clamp_(min=0.0).sqrt_()
    norms = torch.where(change == 0.0, lengths, changed)
    return norms, NormState(lengths, A.clone(), B.clone(), scaling, norms)


def _same(known: NormState, A: Tensor, B: Tensor, scaling: float) -> bool:
    factors = ((known.A, A), (known.B, B))
    return known.scaling == scaling and all(
        old.dtype == new.dtype and torch.equal(old, new) for old, new in factors
    )


def _shrink(rows: Tensor, f: Factors, dtype: torch.dtype, dropout: Dropout | None) -> Tensor:
    """S = drop(x) Aᵀ, rounded once to the compute dtype."""
    assert f.A is not None
    A = f.A.to(dtype).to(rows.dtype)
    S = rows @ A.T if dropout is None else dropout.shrink(rows, A)
    return _in_spans(S, f).to(dtype)


def _in_spans(S: Tensor, f: Factors) -> Tensor:
    """S, in place, with zeros where a row belongs to a sample that does not use the column."""
    if f.rank_spans is None or S.shape[0] == 0:
        return S
    columns = torch.arange(S.shape[1], device=S.device)
    used = (columns >= f.rank_spans[:, :1]) & (columns < f.rank_spans[:, 1:])
    samples = used.shape[0]
    S.view(samples, -1, S.shape[1]).masked_fill_(~used.unsqueeze(1), 0.0)
    return S


def _dropout(f: Factors, x: Tensor, mask: Tensor | None) -> Dropout | None:
    if f.dropout_p == 0.0:
        return None
    if mask is None:
        M, K = x.shape
        mask = dropout_mask(f.dropout_seed, M, K, f.dropout_p, x.device)
    return Dropout(mask, f.dropout_p)


def _expand_factor(f: Factors, dtype: torch.dtype) -> Tensor:
    """b dᵀ ⊙ B [N, R], in the compute dtype; the scaling s is applied to the product."""
    assert f.B is not None
    B = f.B
    if f.d is not None:
        B = B * f.d
    if f.b is not None:
        B = B * f.b.unsqueeze(1)
    return B.to(dtype)


def _times_gain(matrix: Tensor, f: Factors) -> Tensor:
    """g ⊙ a matrix of N rows."""
    return matrix if f.g is None else matrix * f.g.to(matrix.dtype).unsqueeze(1)


def _input_gradient(
    dY: Tensor, dS: Tensor | None, f: Factors, dtype: torch.dtype, dropout: Dropout | None
) -> Tensor:
    work = dY.dtype
    W = _dense(f.weight, dtype).to(work)
    # g is put on the smaller one of dY [M, N] and W [N, K].
    if f.g is not None and dY.shape[0] < W.shape[1]:
        dX = (dY * f.g.to(work)) @ W
    else:
        dX = dY @ _times_gain(W, f)
    if dS is not None and f.A is not None:
        A = f.A.to(dtype).to(work)
        if dropout is None:
            dX.addmm_(dS.to(work), A)
        else:
            dropout.add_input_gradient(dX, dS.to(work), A)
    return dX.to(dtype)


def _shrunk_gradient(dY: Tensor, f: Factors, dtype: torch.dtype) -> Tensor:
    """dS = dY (s · (g b) dᵀ ⊙ B) [M, R], rounded once to the compute dtype."""
    Q = _times_gain(_expand_factor(f, dtype).to(dY.dtype), f)
    return _in_spans((dY @ Q).mul_(f.scaling), f).to(dtype)


def _factor_gradient(dS: Tensor | None, x: Tensor, f: Factors, dropout: Dropout | None) -> Tensor:
    """dA = dSᵀ drop(x), in A's dtype."""
    assert f.A is not None and dS is not None
    return _kept_product(dS.to(x.dtype), x, dropout).to(f.A.dtype)


def _kept_product(dS: Tensor, x: Tensor, dropout: Dropout | None) -> Tensor:
    """dSᵀ drop(x) [R, K], not rounded below float32."""
    if dropout is None:
        return _product(dS.T, x)
    wide = torch.promote_types(x.dtype, torch.float32)
    dA = torch.zeros(dS.shape[1], x.shape[1], dtype=wide, device=x.device)
    for rows, kept in dropout.kept(x):
        _add_product(dA, dS[rows].T, kept)
    return dA.mul_(dropout.keep_scale)


def _output_gradients(dY: Tensor, S: Tensor | None, f: Factors, needs: Needs) -> Gradients:
    """dbias, and from T = g ⊙ (dYᵀ S) [N, R] dB, db and dd; sums are not below float32."""
    dbias = dB = db = dd = None
    if needs.bias and f.bias is not None:
        wide = torch.promote_types(dY.dtype, torch.float32)
        dbias = dY.sum(0, dtype=wide).to(f.bias.dtype)
    if S is None or f.B is None or not (needs.B or needs.b or needs.d):
        return Gradients(bias=dbias)
    T = _times_gain(_product(dY.T, S.to(dY.dtype)), f) * f.scaling
    if needs.B:
        dB = T if f.d is None else T * f.d
        dB = (dB if f.b is None else dB * f.b.unsqueeze(1)).to(f.B.dtype)
    if needs.b or needs.d:
        # Sums of N · R products with cancellation: float64 costs nothing at this size.
        TB = T.double() * f.B
        if needs.b and f.b is not None:
            db = (TB.sum(1) if f.d is None else TB @ f.d.double()).to(f.b.dtype)
        if needs.d and f.d is not None:
            dd = (TB.sum(0) if f.b is None else f.b.double() @ TB).to(f.d.dtype)
    return Gradients(bias=dbias, B=dB, b=db, d=dd)


def _gain_gradient(dY: Tensor, V: Tensor | None, f: Factors) -> Tensor:
    """dg = Σ_M dY ⊙ V."""
    assert f.g is not None and V is not None
    wide = torch.promote_types(dY.dtype, torch.float32)
    total = torch.zeros(dY.shape[1], dtype=wide, device=dY.device)
    # On a CPU a few rows at a time, which stay in the cache.
    step = max(1, _GAIN_ELEMENTS // dY.shape[1]) if dY.device.type == "cpu" else dY.shape[0]
    for start in range(0, dY.shape[0], max(1, step)):
        rows = slice(start, start + step)
        total += torch.linalg.vecdot(dY[rows].to(wide), V[rows].to(wide), dim=0)
    return total.to(f.g.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, not rounded below float32."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, for a total that is not below float32."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(_product(a, b))


def _dense(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    return weight.dequantize(dtype) if isinstance(weight, NF4Weight) else weight.to(dtype)


def _weight_dtype(f: Factors) -> torch.dtype:
    return f.weight.dtype


def _working_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products are formed; float32 where 16-bit products would be emulated."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return x.dtype
    native = x.dtype == torch.bfloat16 and _cpu_has_bfloat16()
    return x.dtype if native else torch.float32


@functools.cache
def _cpu_has_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
