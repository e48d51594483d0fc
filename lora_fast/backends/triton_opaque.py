"""The low rank on the output y of an opaque base in the Triton backend.

    y ← y + s · b ⊙ ((d ⊙ S) Bᵀ) + bias          S = drop(x) Aᵀ

A launch makes S and one the low-rank part, which is added to y; where cuBLAS may multiply, product
and sum are one call. Backward is that of hybrid without its products with W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..factors import Factors, Gradients, Needs, Saved
from ..kernels import expand, shrink, ticketed_gemm
from . import triton_routes
from .torch_layer import without_autocast
from .torch_low_rank import expand_factor, given
from .triton_gradients import grad_A, output_side
from .triton_operands import Launching, dropout, vectors


def shrunk(rows: Tensor, f: Factors, *, cublas: bool) -> Tensor:
    """S [M, R] of x [M, K]."""
    if cublas:
        return triton_routes.shrunk(rows, [f])
    return shrink.of_rows(rows, [given(f.A)], dropout(f), f.constants.rank_spans)


def expanded(
    S: Tensor, f: Factors, dtype: torch.dtype, y: Tensor | None, *, cublas: bool, in_place: bool
) -> Tensor:
    """y [M, N] plus the low-rank part of S [M, R], in the memory of y if `in_place`."""
    B, s = given(f.B), f.constants.scaling
    total = None if y is None else y.reshape(-1, y.shape[-1])
    if cublas and total is not None and total.dtype is S.dtype and f.bias is None:
        Q = expand_factor(f, S.dtype)
        if triton_routes.multiplies(S, [Q], Q.shape[1]):
            return (torch.Tensor.addmm_ if in_place else torch.addmm)(total, S, Q.T, alpha=s)
    bias, gains = vectors(f)
    (part,) = expand.outputs(S, dtype, [expand.Layer(B, s, bias)], gains)
    if total is None:
        return part
    return total.add_(part) if in_place else torch.add(total, part).to(total.dtype)


def gradients(dY: Tensor, x: Tensor | None, saved: Saved, f: Factors, needs: Needs) -> Gradients:
    """As the protocol has it."""
    A, rows = given(f.A), dY.reshape(-1, dY.shape[-1])
    (M, N), K = rows.shape, A.shape[1]
    if M == 0:
        zeros = {
            name: torch.zeros_like(getattr(f, name))
            for name in Needs._fields[1:]
            if getattr(needs, name)
        }
        return Gradients(x=dY.new_empty((*dY.shape[:-1], K)) if needs.x else None, **zeros)
    dropped, (bias, gains) = dropout(f), vectors(f)
    needs_dS = needs.x or needs.A
    with Launching(rows), without_autocast(rows):
        found, partials = output_side(rows, saved.S, None, f, bias, gains, needs, needs_dS)
        if needs_dS:
            # No tile reads W, only its shape.
            W = rows.as_strided((N, K), (0, 0))
            layer = ticketed_gemm.Layer(rows, W, A, f.B, f.constants.scaling, partials)
            _, dS = ticketed_gemm.grad_input(
                [layer], dropped, gains=gains, rank_spans=f.constants.rank_spans, wants_dX=False
            )
            if needs.x:
                dX = expand.input_gradient(dS, rows.dtype, [A], dropped)
                found = found._replace(x=dX.view(*dY.shape[:-1], K))
            if needs.A and x is not None:
                found = found._replace(A=grad_A(x.reshape(-1, K), dS, [f])[0])
    return found
