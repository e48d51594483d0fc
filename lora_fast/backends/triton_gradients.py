"""Gradients of the factors of layers, in one read of dY or x each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..factors import Factors, Gradients, Needs
from ..kernels import strips
from ..kernels.tiles import Gains
from .protocol import ranks_of
from .triton_operands import dropout, factors_A


def output_side(
    dY: Tensor,
    S: Tensor | None,
    V: Tensor | None,
    f: Factors,
    bias: Tensor | None,
    gains: Gains,
    need: Needs,
    needs_dS: bool,
) -> tuple[Gradients, Tensor | None]:
    """dB, db, dd, dg and dbias of one layer, and the partials of its dS if they pay off."""
    wanted = strips.Wanted(need.B, need.b, need.d, need.g, need.bias)
    if not (wanted.needs_T or wanted.sums):
        return Gradients(), None
    grads, partials = strips.grad_expand(
        dY, f.B, f.constants.scaling, wanted=wanted, S=S, V=V, bias=bias, gains=gains,
        stores_dS=needs_dS and wanted.needs_T and _storing_dS_pays(dY, f),
    )  # fmt: skip
    return Gradients(**grads), partials


def _storing_dS_pays(dY: Tensor, f: Factors) -> bool:
    return f.A is not None and strips.storing_dS_pays(dY.shape[1], f.A.shape[0], dY.dtype)


def grad_A(x: Tensor, dS: Any, fs: Sequence[Factors]) -> Sequence[Tensor]:
    """dA of every layer in one launch."""
    factors = factors_A(fs)
    dtypes = {A.dtype for A in factors}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    dA = strips.grad_shrink(x, dS, dtype, dropout(fs[0]))
    if len(fs) == 1:
        return [dA]
    return [dA_i.to(A.dtype) for dA_i, A in zip(dA.split(ranks_of(fs)), factors, strict=True)]
