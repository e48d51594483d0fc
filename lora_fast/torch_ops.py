"""The torch backend: forward and backward of the equation in as few aten calls as it takes.

    forward    S = drop(x) Aᵀ        y = g ⊙ (x Wᵀ + s · b ⊙ ((d ⊙ S) Bᵀ)) + bias
    backward   dV = g ⊙ dY           dQ = s · (b ⊙ dV)       dU = dQ B          dS = d ⊙ dU
               dX = dV W + drop'(dS A)     dA = dSᵀ drop(x)     dW = dVᵀ x
               T = dVᵀ S [N, R]      dB = s · b dᵀ ⊙ T       db = s · rowsum(B ⊙ T dᵀ)
               dd = s · colsum(b B ⊙ T)    dg = Σ_M dY ⊙ V   dbias = Σ_M dY

Products accumulate in float32, S is rounded once to the compute dtype. A CPU without bfloat16
instructions multiplies 16-bit operands as float32 (the same products, many times faster).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .factors import Factors, Gradients, Needs
from .nf4 import NF4Weight
from .reference import dropout_mask


def forward(x: Tensor, f: Factors, needs: Needs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [M, N] and, where the backward pass needs them, S [M, R] and V [M, N]; x is [M, K]."""
    dtype, work = x.dtype, _working_dtype(x)
    rows = x.to(work)
    weight = _dense(f.weight, dtype).to(work)
    bias = None if f.bias is None else f.bias.to(work)
    V = torch.nn.functional.linear(rows, weight, bias if f.g is None else None)
    S = None
    if f.A is not None and f.B is not None:
        S = _shrink(rows, f, dtype)
        V.addmm_(S.to(work), _expand_factor(f, dtype).to(work).T, alpha=f.scaling)
    y, saved = V, None
    if f.g is not None:
        saved = V.to(dtype) if needs.saves_V else None
        y = V * f.g.to(work)
        if bias is not None:
            y.add_(bias)
    return y.to(dtype), S if needs.saves_S else None, saved


def backward(
    dY: Tensor, x: Tensor | None, S: Tensor | None, V: Tensor | None, f: Factors, needs: Needs
) -> Gradients:
    """Every wanted gradient for dY [M, N]; x [M, K], S [M, R], V [M, N] as forward left them."""
    dtype, work = dY.dtype, _working_dtype(dY)
    dYw = dY.to(work)
    dV = dYw if f.g is None else dYw * f.g.to(work)
    xw = None if x is None else x.to(work)
    dS = None
    if f.A is not None and (needs.A or needs.x):
        dS = (dV @ _expand_factor(f, dtype).to(work)).mul_(f.scaling).to(dtype)
    dB = db = dd = None
    if S is not None:
        dB, db, dd = _expand_gradients(_product(dV.T, S.to(work)), f, needs)
    return Gradients(
        x=_input_gradient(dV, dS, f, dtype) if needs.x else None,
        weight=_product(dV.T, xw).to(_weight_dtype(f)) if needs.weight and xw is not None else None,
        bias=_sum_rows(dY).to(f.bias.dtype) if needs.bias and f.bias is not None else None,
        A=_shrink_gradient(dS, xw, f) if needs.A and dS is not None and xw is not None else None,
        B=dB,
        b=db,
        d=dd,
        g=_gain_gradient(dY, V, f) if needs.g and V is not None else None,
    )


def _shrink(rows: Tensor, f: Factors, dtype: torch.dtype) -> Tensor:
    """S = drop(x) Aᵀ, rounded once to the compute dtype."""
    assert f.A is not None
    A = f.A.to(dtype).to(rows.dtype)
    if f.dropout_p == 0.0:
        return (rows @ A.T).to(dtype)
    mask = _mask(f, rows)
    return (rows.masked_fill(~mask, 0.0) @ A.T).mul_(_keep_scale(f)).to(dtype)


def _expand_factor(f: Factors, dtype: torch.dtype) -> Tensor:
    """b dᵀ ⊙ B [N, R], in the compute dtype; the scaling s is applied to the product."""
    assert f.B is not None
    B = f.B
    if f.d is not None:
        B = B * f.d
    if f.b is not None:
        B = B * f.b.unsqueeze(1)
    return B.to(dtype)


def _input_gradient(dV: Tensor, dS: Tensor | None, f: Factors, dtype: torch.dtype) -> Tensor:
    work = dV.dtype
    dX = dV @ _dense(f.weight, dtype).to(work)
    if dS is not None and f.A is not None:
        A = f.A.to(dtype).to(work)
        if f.dropout_p == 0.0:
            dX.addmm_(dS.to(work), A)
        else:
            mask = _mask(f, dX)
            dX.add_((dS.to(work) @ A).masked_fill_(~mask, 0.0), alpha=_keep_scale(f))
    return dX.to(dtype)


def _shrink_gradient(dS: Tensor, xw: Tensor, f: Factors) -> Tensor:
    """dA = dSᵀ drop(x), in A's dtype."""
    assert f.A is not None
    left = dS.to(xw.dtype).T
    if f.dropout_p == 0.0:
        return _product(left, xw).to(f.A.dtype)
    mask = _mask(f, xw)
    return (_product(left, xw.masked_fill(~mask, 0.0)) * _keep_scale(f)).to(f.A.dtype)


def _expand_gradients(
    T: Tensor, f: Factors, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dB, db, dd from T = dVᵀ S [N, R], which is not rounded below float32."""
    assert f.B is not None
    T = T * f.scaling
    dB = db = dd = None
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
    return dB, db, dd


def _gain_gradient(dY: Tensor, V: Tensor, f: Factors) -> Tensor:
    """dg = Σ_M dY ⊙ V."""
    assert f.g is not None
    wide = torch.promote_types(dY.dtype, torch.float32)
    return (dY.to(wide) * V.to(wide)).sum(0).to(f.g.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, not rounded below float32."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _sum_rows(dY: Tensor) -> Tensor:
    return dY.sum(0, dtype=torch.promote_types(dY.dtype, torch.float32))


def _mask(f: Factors, like: Tensor) -> Tensor:
    M, K = like.shape
    return dropout_mask(f.dropout_seed, M, K, f.dropout_p, like.device)


def _keep_scale(f: Factors) -> float:
    return 1.0 / (1.0 - f.dropout_p) if f.dropout_p < 1.0 else 0.0


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
