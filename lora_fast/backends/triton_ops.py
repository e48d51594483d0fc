"""The Triton backend: the factors of the equation, handed to the kernels.

One launch forward, at most three backward; for many rows one more per direction, which decodes an
NF4 weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..factors import Factors, Gradients, Needs, Saved
from ..kernels import dropout as dropout_kernels
from ..kernels import (
    environment,
    launch_policy,
    nf4_decode,
    nf4_tile,
    strips,
    ticketed_gemm,
    weight_update,
    workspace,
)
from ..kernels import row_norms as row_norms_kernels
from ..kernels.tiles import NO_GAINS, Gains
from ..nf4 import NF4Weight
from ..tuning.plans import FUSED, Plan

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dropout_mask(seed: int, M: int, K: int, p: float, device: torch.device | str = "cpu") -> Tensor:
    """The boolean [M, K] keep-mask that the kernels use for `seed`."""
    return dropout_kernels.dropout_mask(M, K, dropout_kernels.Dropout(p, seed), device)


def forward(x: Tensor, f: Factors, needs: Needs, plan: Plan = FUSED) -> tuple[Tensor, Saved]:
    """y [M, N] and, where the backward pass needs them, S and V; x is [M, K]."""
    _check_dtype(x)
    f, gains = _with_dense_vectors(f)
    with _Launching(x):
        weight = _gemm_operand(f.weight, x, plan.workspace)
        y, S, V = ticketed_gemm.forward(
            x, weight, f.A, f.B, f.scaling, bias=f.bias, gains=gains, dropout=_dropout(f),
            rank_spans=f.rank_spans, saves_V=needs.saves_V, config=plan.gemm,
        )  # fmt: skip
    return y, Saved(S if needs.saves_S else None, V)


def backward(
    dY: Tensor, x: Tensor | None, saved: Saved, f: Factors, needs: Needs, plan: Plan = FUSED
) -> Gradients:
    """Every wanted gradient for dY [M, N]; x [M, K] and `saved` as forward left them."""
    if dY.shape[0] == 0:
        return _empty_batch(dY, f, needs)
    with _Launching(dY):
        return _gradients(dY, x, saved, *_with_dense_vectors(f), needs, plan)


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
    """out [N, K] ← round(g ⊙ (W + s · (b ⊙ (B d)) A)) in one launch; out may be W."""
    _check_dtype(W)
    gains = Gains(*(None if v is None else v.contiguous() for v in (b, d, g)))
    with _Launching(W):
        weight_update.update(W, out, A, B, gains, scaling)
    # What autograd has saved of a tensor that a kernel overwrote must not pass for intact.
    torch.autograd.graph.increment_version(out)


def forward_group(
    x: Tensor, fs: Sequence[Factors], plan: Plan = FUSED
) -> tuple[list[Tensor], Tensor, None]:
    """y [M, N_i] of layers that read the same x, and their S [M, Σ R_i] side by side.

    One launch a layer; of many rows the first makes S for all.
    """
    _check_dtype(x)
    factors = _factors_A(fs)
    made = x.new_empty(x.shape[0], sum(A.shape[0] for A in factors))
    columns = made.split(_ranks(fs), dim=1)
    shrinks = [{"A": A, "made": S} for A, S in zip(factors, columns, strict=True)]
    if launch_policy.shares_shrink(x.shape[0]):
        shrinks = [{"A": A, "S": S} for A, S in zip(factors, columns, strict=True)]
        shrinks[0] = {"A": torch.cat(factors), "made": made}
    ys = []
    # Configurations go by the rank of the layer, also where the rows of its part of S start off 16
    # bytes for the ranks of the others: that takes 4 registers more, 248 on sm_80, and spills none.
    with _Launching(x):
        for f, shrink in zip(fs, shrinks, strict=True):
            y, *_ = ticketed_gemm.forward(
                x, _gemm_operand(f.weight, x, plan.workspace), B=f.B, scaling=f.scaling,
                bias=f.bias, dropout=_dropout(f), config=plan.gemm, **shrink,
            )  # fmt: skip
            ys.append(y)
    return ys, made, None


def backward_group(
    dYs: Sequence[Tensor],
    x: Tensor | None,
    S: Tensor,
    mask: None,
    fs: Sequence[Factors],
    needs: list[Needs],
    plan: Plan = FUSED,
) -> list[Gradients]:
    """The gradients of every layer of a group; that of x, their sum, is with the first.

    One launch a layer, one for dX and one for all dA.
    """
    if S.shape[0] == 0:
        return [_empty_batch(dY, f, need) for dY, f, need in zip(dYs, fs, needs, strict=True)]
    needs_dS = any(need.A for need in needs)
    with _Launching(S):
        grads, layers = [], []
        for dY, S_i, f, need in zip(dYs, S.split(_ranks(fs), dim=1), fs, needs, strict=True):
            found, partials = _output_side(dY, S_i, f, need, needs_dS or need.x)
            weight = _shape_only(f.weight, dY)
            if need.x:
                weight = _gemm_operand(f.weight, dY, plan.workspace)
            grads.append(found)
            layers.append(ticketed_gemm.Layer(dY, weight, f.A, f.B, f.scaling, partials))
        if needs_dS or needs[0].x:
            dropout = _dropout(fs[0])
            dX, dS = ticketed_gemm.grad_input(
                layers, dropout, wants_dX=needs[0].x, config=plan.gemm
            )
            grads[0] = grads[0]._replace(x=dX)
        if needs_dS and x is not None:
            dAs = _grad_A(x, dS, fs)
            grads = [
                grad._replace(A=dA) if need.A else grad
                for grad, dA, need in zip(grads, dAs, needs, strict=True)
            ]
    return grads


def _output_side(
    dY: Tensor, S: Tensor, f: Factors, need: Needs, needs_dS: bool
) -> tuple[Gradients, Tensor | None]:
    """dB and dbias of one layer, and the partials of its dS where they pay."""
    wanted = strips.Wanted(B=need.B, bias=need.bias)
    if not (wanted.needs_T or wanted.sums):
        return Gradients(), None
    grads, partials = strips.grad_expand(
        dY, f.B, f.scaling, wanted=wanted, S=S, bias=f.bias,
        stores_dS=needs_dS and need.B and _projection_pays(dY, f),
    )  # fmt: skip
    return Gradients(**grads), partials


def _grad_A(x: Tensor, dS: Tensor, fs: Sequence[Factors]) -> list[Tensor]:
    """dA of every layer of a group in one launch."""
    factors = _factors_A(fs)
    dtypes = {A.dtype for A in factors}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    dAs = strips.grad_shrink(x, dS, dtype, _dropout(fs[0])).split(_ranks(fs))
    return [dA.to(A.dtype) for dA, A in zip(dAs, factors, strict=True)]


def _factors_A(fs: Sequence[Factors]) -> list[Tensor]:
    return [f.A for f in fs if f.A is not None]


def _ranks(fs: Sequence[Factors]) -> list[int]:
    return [A.shape[0] for A in _factors_A(fs)]


def row_norms(weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """‖W_i + s (B A)_i‖₂ [N] in float32, in one launch; one more decodes NF4."""
    with _Launching(A):
        return row_norms_kernels.norms_of(dense(weight, weight.dtype), A, B, scaling)


def _gradients(
    dY: Tensor,
    x: Tensor | None,
    saved: Saved,
    f: Factors,
    gains: Gains,
    needs: Needs,
    plan: Plan,
) -> Gradients:
    grads: dict[str, Tensor | None] = {}
    partials = None
    needs_dS = f.has_adapter and (needs.x or needs.A)
    wanted = strips.Wanted(needs.B, needs.b, needs.d, needs.g, needs.bias)
    if wanted.needs_T or wanted.sums:
        grads, partials = strips.grad_expand(
            dY, f.B, f.scaling, wanted=wanted, S=saved.S, V=saved.V, bias=f.bias, gains=gains,
            stores_dS=needs_dS and wanted.needs_T and _projection_pays(dY, f),
        )  # fmt: skip
    if needs_dS or needs.x:
        weight = _shape_only(f.weight, dY)
        if needs.x:
            weight = _gemm_operand(f.weight, dY, plan.workspace)
        layer = ticketed_gemm.Layer(dY, weight, f.A, f.B, f.scaling, partials)
        dX, dS = ticketed_gemm.grad_input(
            [layer], _dropout(f), gains=gains, rank_spans=f.rank_spans, wants_dX=needs.x,
            config=plan.gemm,
        )  # fmt: skip
        grads["x"] = dX
        if needs.A and f.A is not None:
            grads["A"] = strips.grad_shrink(x, dS, f.A.dtype, _dropout(f))
    if needs.weight and x is not None:
        grads["weight"] = _weight_gradient(dY, x, f)
    return Gradients(**grads)


class _Launching:
    """Launch on x's device, which need not be the current one; leave no tickets of a failure."""

    def __init__(self, x: Tensor) -> None:
        index = x.get_device()
        elsewhere = index >= 0 and x.is_cuda and index != torch.cuda.current_device()
        self._device = torch.cuda.device(index) if elsewhere else None

    def __enter__(self) -> None:
        if self._device is not None:
            self._device.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *exc: Any) -> None:
        if kind is not None:
            workspace.forget()
        if self._device is not None:
            self._device.__exit__(kind, *exc)


def _with_dense_vectors(f: Factors) -> tuple[Factors, Gains]:
    """The factors and their gains; kernels read vectors of N or R elements one after the other."""
    if f.bias is None and f.b is None and f.d is None and f.g is None:
        return f, NO_GAINS
    bias, b, d, g = (None if v is None else v.contiguous() for v in (f.bias, f.b, f.d, f.g))
    return f._replace(bias=bias, b=b, d=d, g=g), Gains(b, d, g)


def _projection_pays(dY: Tensor, f: Factors) -> bool:
    return f.A is not None and strips.projection_pays(dY.shape[1], f.A.shape[0], dY.dtype)


def _empty_batch(dY: Tensor, f: Factors, needs: Needs) -> Gradients:
    K = f.weight.shape[1]
    zeros = {
        name: torch.zeros_like(getattr(f, name))
        for name in Needs._fields[1:]
        if getattr(needs, name)
    }
    return Gradients(x=dY.new_empty((0, K)) if needs.x else None, **zeros)


def _weight_gradient(dY: Tensor, x: Tensor, f: Factors) -> Tensor:
    """dW = dVᵀ x: a plain product of two large matrices, which cuBLAS does best."""
    dV = dY if f.g is None else (dY * f.g).to(dY.dtype)
    return (dV.T @ x).to(f.weight.dtype)


def _gemm_operand(
    weight: Tensor | NF4Weight, x: Tensor, workspace: bool | None = None
) -> Tensor | nf4_tile.Nf4Operand:
    """The weight in the dtype of x [M, …]; as it is packed where the GEMM of M rows decodes it,
    which is for launch_policy.py to say unless the caller does."""
    if not isinstance(weight, NF4Weight):
        return weight if weight.dtype == x.dtype else weight.to(x.dtype)
    if workspace is None:
        arch = environment.current_arch()
        reason = launch_policy.why_nf4_workspace(x.shape[0], weight.shape[1], x.dtype, arch)
        workspace = reason is not None
    if workspace:
        return dense(weight, x.dtype)
    return nf4_tile.Nf4Operand(weight.packed, weight.quant_state)


def dense(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`; NF4 decoded in one launch."""
    if isinstance(weight, NF4Weight):
        return nf4_decode.decode(weight.packed, weight.quant_state, dtype)
    return weight.to(dtype)


def _shape_only(weight: Tensor | NF4Weight, like: Tensor) -> Tensor:
    """Stands for a weight that no tile reads: only dS is wanted."""
    return like.new_empty(()).expand(weight.shape)


def _dropout(f: Factors) -> dropout_kernels.Dropout:
    if f.dropout_p == 0.0 or f.A is None:
        return dropout_kernels.NO_DROPOUT
    return dropout_kernels.Dropout(f.dropout_p, f.dropout_seed)


def _check_dtype(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise NotImplementedError(
            f"x must be float32, bfloat16 or float16 for the triton backend, got {x.dtype}; "
            "set_backend('torch') computes in float64"
        )
