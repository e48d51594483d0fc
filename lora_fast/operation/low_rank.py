"""The low rank on the output of an opaque base: a layer that computes y [..., N] by itself.

    y ← y + s · b ⊙ ((d ⊙ S) Bᵀ) + bias          S = drop(x) Aᵀ

The base runs as it is, with its hooks and its autograd; dX here is the part of the low rank, which
autograd adds to that of the base. Saved for backward, beside parameters: x if A trains, S if B, b
or d trains, and dropout's seed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends.protocol import Backend
from ..backends.selection import backend_for
from ..factors import NO_WEIGHT, Factors, Needs, Saved, saved_input
from .autograd import is_recording
from .saved_leaves import as_they_are, x_as_it_is
from .second_derivatives import differentiable_once
from .seeds import draw_seed
from .selective import as_one

_NOTHING = Needs()


@as_one
def add_low_rank(y: Tensor | None, x: Tensor, f: Factors, *, in_place: bool = False) -> Tensor:
    """The equation above for x [..., K] in the compute dtype, differentiable; without y the part
    that is added to it, in the dtype of x.

    A [R, K] and B [N, R] of f fit x and y; its weight is not read, g is absent, and the scaling is
    a number. With `in_place` the result is in the memory of y, a contiguous tensor that is no view
    and that no function saved for backward.
    """
    if f.constants.dropout_p > 0.0:
        f = f._replace(constants=f.constants._replace(dropout_seed=draw_seed(x.device)))
    backend = backend_for(x.device)
    if not is_recording():
        return backend.add_low_rank(y, x, f, _NOTHING, in_place=in_place)[0]
    return _AddLowRank.apply(y, x, f, backend, in_place, f.bias, f.A, f.B, f.b, f.d)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor | None,
        x: Tensor,
        f: Factors,
        backend: Backend,
        in_place: bool,
        *tensors: Tensor | None,
    ) -> Tensor:
        needs = _needs_of(ctx.needs_input_grad)
        out, saved = backend.add_low_rank(y, x, f, needs, in_place=in_place)
        if in_place:
            ctx.mark_dirty(out)
        seed = f.constants.dropout_seed
        word = seed if isinstance(seed, Tensor) else None
        ctx.constants = f.constants if word is None else f.constants._replace(dropout_seed=0)
        read = saved_input(x, f.constants, needs, copies=backend.copies_input)
        of_layer = as_they_are(tensors, () if needs.bias else (0,))
        ctx.save_for_backward(x_as_it_is(read), saved.S, word, *of_layer)
        ctx.backend, ctx.dtypes = backend, (x.dtype, out.dtype if y is None else y.dtype)
        return out

    @staticmethod
    @partial(differentiable_once, x=1)
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, S, word, bias, A, B, b, d = ctx.saved_tensors
        needs_y, needs = ctx.needs_input_grad[0], _needs_of(ctx.needs_input_grad)
        dtype, of_y = ctx.dtypes
        constants = ctx.constants if word is None else ctx.constants._replace(dropout_seed=word)
        f = Factors(NO_WEIGHT, bias, A, B, b, d, None, constants)
        grads = ctx.backend.low_rank_gradients(dY.to(dtype), x, Saved(S), f, needs)
        return (
            dY.to(of_y) if needs_y else None,
            grads.x,
            *(None, None, None),
            *(grads.bias, grads.A, grads.B, grads.b, grads.d),
        )


def _needs_of(needs_input_grad: tuple[bool, ...]) -> Needs:
    _, x, _, _, _, bias, A, B, b, d = needs_input_grad
    return Needs(x=x, bias=bias, A=A, B=B, b=b, d=d)
