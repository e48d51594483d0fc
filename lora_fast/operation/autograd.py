"""The equation as two torch.autograd.Functions: one layer, and a group that reads the same x.

Saved for backward, beside parameters: x if A (or W) trains, S = drop(x) Aᵀ if B, b or d trains, V =
(y − bias) / g if g trains. For dropout the seed is saved; on the torch backend also a copy of x,
which the caller may change in place as with PEFT, and the mask, one byte per element. An NF4 weight
stays packed and is decoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from ..backends.choice import Backend, uses_triton
from ..factors import Constants, Factors, Gradients, Needs, Saved
from ..nf4 import NF4Weight
from . import dispatch

# Positions of the differentiable arguments of apply(), in the order of Needs.
_DIFFERENTIABLE = ("x", "weight", "bias", "A", "B", "b", "d", "g")
_UNCHANGED = nullcontext()


def forward(x: Tensor, f: Factors, needs: Needs, backend: Backend) -> tuple[Tensor, Saved]:
    """y [..., N] for x [..., K], and what the backward pass needs beside x and the factors."""
    with _without_autocast(x):
        y, saved = dispatch.forward(x.reshape(-1, x.shape[-1]), f, needs, backend)
    return _shaped(y, x), saved


def forward_group(
    x: Tensor, fs: Sequence[Factors], backend: Backend
) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
    """y_i [..., N_i] of layers that read the same x [..., K], the S [M, Σ R_i] of all, the mask."""
    with _without_autocast(x):
        ys, S, mask = dispatch.forward_group(x.reshape(-1, x.shape[-1]), fs, backend)
    return tuple([_shaped(y, x) for y in ys]), S, mask


def backward(
    dY: Tensor, x: Tensor | None, saved: Saved, f: Factors, needs: Needs, backend: Backend
) -> Gradients:
    """The gradients that `needs` names, for dY [..., N] and what :func:`forward` saved."""
    rows = None if x is None else x.reshape(-1, x.shape[-1])
    with _without_autocast(dY):
        grads = dispatch.backward(dY.reshape(-1, dY.shape[-1]), rows, saved, f, needs, backend)
    if grads.x is None:
        return grads
    return grads._replace(x=grads.x.view(*dY.shape[:-1], grads.x.shape[-1]))


class AdaptedLinear(torch.autograd.Function):
    """apply(x, weight, bias, A, B, b, d, g, constants, backend) → y; x [..., K] is in the compute
    dtype, everything else in its own; `constants` are :class:`lora_fast.factors.Constants`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | NF4Weight, *rest: Any) -> Tensor:
        bias, A, B, b, d, g, constants, backend = rest
        f = Factors(weight, bias, A, B, b, d, g, *constants)
        needs = Needs(*ctx.needs_input_grad[: len(_DIFFERENTIABLE)])
        y, saved = forward(x, f, needs, backend)
        nf4 = isinstance(weight, NF4Weight)
        ctx.save_for_backward(
            saved_input(x, constants, needs, backend),
            *saved,
            None if nf4 else weight,
            bias,
            A,
            B,
            b,
            d,
            g,
        )
        ctx.nf4 = weight if nf4 else None
        ctx.constants, ctx.backend = constants, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, S, V, mask, weight, *vectors = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[: len(_DIFFERENTIABLE)])
        f = Factors(ctx.nf4 if weight is None else weight, *vectors, *ctx.constants)
        grads = backward(dY, x, Saved(S, V, mask), f, needs, ctx.backend)
        return (*grads, None, None)


class AdaptedLinearGroup(torch.autograd.Function):
    """apply(x, weights, constants, backend, bias_1, A_1, B_1, bias_2, …) → y_1, y_2, …: LoRA layers
    that read the same x [..., K], with one shrink, one dX and one product for all dA. Their
    weights, tensors or NF4Weights in a tuple, are frozen, and they share one dropout mask; saved
    are x and the S of all layers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Sequence[Any],
        constants: Sequence[Constants],
        backend: Backend,
        *vectors: Any,
    ) -> tuple[Tensor, ...]:
        ys, S, mask = forward_group(x, group_factors(weights, constants, vectors), backend)
        needs = _group_needs(ctx)
        trains_A, trains_B = any(need.A for need in needs), any(need.B for need in needs)
        needs_mask = trains_A or ctx.needs_input_grad[0]
        ctx.save_for_backward(
            saved_input(x, constants[0], Needs(A=trains_A), backend),
            S if trains_B else None,
            mask if needs_mask else None,
            *vectors,
        )
        ctx.weights, ctx.constants, ctx.backend = weights, constants, backend
        ctx.x_shape, ctx.S_shape = x.shape, S.shape
        ctx.set_materialize_grads(False)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dYs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, S, mask, *vectors = ctx.saved_tensors
        fs = group_factors(ctx.weights, ctx.constants, vectors)
        like = next(dY for dY in dYs if dY is not None)
        rows = [
            like.new_zeros(ctx.S_shape[0], f.weight.shape[0])
            if dY is None
            else dY.reshape(-1, dY.shape[-1])
            for dY, f in zip(dYs, fs, strict=True)
        ]
        with _without_autocast(rows[0]):
            grads = dispatch.backward_group(
                rows,
                None if x is None else x.reshape(-1, x.shape[-1]),
                # Not read if no B trains.
                rows[0].new_empty(ctx.S_shape) if S is None else S,
                mask,
                fs,
                _group_needs(ctx),
                ctx.backend,
            )
        dX = grads[0].x
        # A layer whose output is unused gets no gradients, as if it were alone.
        found = [
            None if dY is None else gradient
            for dY, grad in zip(dYs, grads, strict=True)
            for gradient in (grad.bias, grad.A, grad.B)
        ]
        return (None if dX is None else dX.view(ctx.x_shape), None, None, None, *found)


def saved_input(x: Tensor, constants: Constants, needs: Needs, backend: Backend) -> Tensor | None:
    """x as the gradients of A and W read it, None if neither trains.

    PEFT's layers save drop(x), or the rows of an adapter's samples, so x may be changed in place
    afterwards; where they save x itself, autograd raises. The torch backend saves a copy in these
    cases. The kernels share x with the model, as without dropout: a copy would cost a pass over x
    and M × K elements per layer. Autograd raises if x was changed.
    """
    if not (needs.A or needs.weight):
        return None
    owned = constants.dropout_p > 0.0 or constants.rank_spans is not None
    copies = owned and not needs.weight and not uses_triton(x.device, backend)
    return x.clone() if copies else x


def is_recording() -> bool:
    """Whether autograd, forward-mode autograd, torch.func or torch.jit is recording operations."""
    return (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def group_factors(
    weights: Sequence[Any], constants: Sequence[Constants], vectors: Sequence[Any]
) -> list[Factors]:
    """The factors of every layer of a group; vectors are bias_1, A_1, B_1, bias_2, …"""
    triples = zip(vectors[0::3], vectors[1::3], vectors[2::3], strict=True)
    return [
        Factors(weight, bias, A, B, None, None, None, *constant)
        for weight, constant, (bias, A, B) in zip(weights, constants, triples, strict=True)
    ]


def _group_needs(ctx: Any) -> list[Needs]:
    needs_x, _, _, _, *rest = ctx.needs_input_grad
    return [
        Needs(x=needs_x, bias=rest[i], A=rest[i + 1], B=rest[i + 2]) for i in range(0, len(rest), 3)
    ]


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """y [M, N] as [..., N]; not a view to autograd, so that the caller may modify it in place."""
    if x.dim() == 2:
        return y
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Every cast is made by hand: autocast would round float32 products a second time."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return _UNCHANGED
    return torch.autocast(device, enabled=False)
