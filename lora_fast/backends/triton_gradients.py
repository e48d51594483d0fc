"""Gradients of the factors of layers, in one read of dY or x each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..factors import Factors, Gradients, Needs
from ..kernels import strips
from ..kernels.tiles import Gains
from .protocol import columns_of, ranks_of
from .triton_operands import dropout, factors_A, vectors


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


def output_sides(
    dYs: Sequence[Tensor],
    S: Tensor | None,
    fs: Sequence[Factors],
    needs: Sequence[Needs],
    needs_dS: bool,
) -> list[tuple[Gradients, Tensor | None]]:
    """:func:`output_side` of plain layers, for the S [M, ΣR] of all; in one launch where they are
    alike."""
    if len(fs) > 1 and S is not None and _share_a_launch(dYs, fs, needs):
        layers = [
            strips.Layer(dY, f.B, f.constants.scaling, f.bias)
            for dY, f in zip(dYs, fs, strict=True)
        ]
        found = strips.grad_expand_group(
            layers, S, wanted=strips.Wanted(B=True, bias=needs[0].bias),
            stores_dS=needs_dS and _storing_dS_pays(dYs[0], fs[0]),
        )  # fmt: skip
        return [(Gradients(**grads), partials) for grads, partials in found]
    return [
        output_side(dY, S_i, None, f, *vectors(f), need, needs_dS)
        for dY, S_i, f, need in zip(dYs, columns_of(S, fs), fs, needs, strict=True)
    ]


def _share_a_launch(dYs: Sequence[Tensor], fs: Sequence[Factors], needs: Sequence[Needs]) -> bool:
    """Whether strips of several plain layers want the same, of operands that lie alike."""
    kinds = set()
    for dY, f, need in zip(dYs, fs, needs, strict=True):
        if f.B is None or not need.B:
            return False
        of_bias = need.bias and f.bias is not None and f.bias.dtype
        stores_dS = _storing_dS_pays(dY, f)
        kinds.add((f.B.shape[1], f.B.stride(), f.B.dtype, of_bias, stores_dS, dY.stride(1)))
    return len(kinds) == 1


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
