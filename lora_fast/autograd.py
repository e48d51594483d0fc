"""The equation as one torch.autograd.Function.

What is kept for the backward pass, beside parameters: x where A (or W) trains, S = drop(x) Aᵀ where
B, b or d trains, V = (y − bias) / g where g trains. Dropout keeps its seed; the torch backend its
mask as well, one byte an element. An NF4 weight stays packed and is decoded again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch
from .factors import Factors, Needs, Saved
from .nf4 import NF4Weight

# Positions of the differentiable arguments of apply(), in the order of Needs.
_DIFFERENTIABLE = ("x", "weight", "bias", "A", "B", "b", "d", "g")


class AdaptedLinear(torch.autograd.Function):
    """apply(x, weight, bias, A, B, b, d, g, constants) → y; x [..., K] is in the compute dtype,
    everything else in its own; `constants` are :class:`lora_fast.factors.Constants`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | NF4Weight, *rest: Any) -> Tensor:
        bias, A, B, b, d, g, constants = rest
        f = Factors(weight, bias, A, B, b, d, g, *constants)
        needs = Needs(*ctx.needs_input_grad[: len(_DIFFERENTIABLE)])
        with _without_autocast(x):
            y, saved = dispatch.forward(x.reshape(-1, x.shape[-1]), f, needs)
        # Not a view to autograd, so that the caller may modify the result in place.
        y = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
        nf4 = isinstance(weight, NF4Weight)
        ctx.save_for_backward(
            x if needs.saves_x else None,
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
        ctx.constants = constants
        ctx.x_shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, S, V, mask, weight, *vectors = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[: len(_DIFFERENTIABLE)])
        f = Factors(ctx.nf4 if weight is None else weight, *vectors, *ctx.constants)
        with _without_autocast(dY):
            grads = dispatch.backward(
                dY.reshape(-1, dY.shape[-1]),
                None if x is None else x.reshape(-1, x.shape[-1]),
                Saved(S, V, mask),
                f,
                needs,
            )
        dX = None if grads.x is None else grads.x.view(ctx.x_shape)
        return (dX, *grads[1:], None)


def _without_autocast(x: Tensor) -> torch.autocast:
    """Every cast is made by hand: autocast would round float32 products a second time."""
    return torch.autocast(x.device.type, enabled=False)
