"""A plain layer of few rows on a CPU: the Function of :mod:`lora_fast.backends.torch_few_rows`.

What AdaptedLinears (autograd.py) does for every backend and any factors takes longer than such a
layer. This one promises the same: what is saved is what the required gradients read, parameters as
they are in the forward pass, and the derivative of a gradient raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.torch_few_rows import FewSaved, covers, gradients
from ..backends.torch_few_rows import output as computed
from ..factors import Factors
from .batched_gradients import is_of_autograd, is_vmap_active
from .saved_leaves import as_they_are, x_as_it_is
from .second_derivatives import differentiable_once

# A named tuple, without its own function.
_new = tuple.__new__


__all__ = ["covers", "output"]
_NO_GRADIENTS = False, False, False


def output(x: Tensor, f: Factors, seed: int | Tensor | None, *, records: bool) -> Tensor:
    """y of a layer that :func:`covers` accepts. `seed` as for :func:`autograd.run`; `records`:
    whether autograd does."""
    if records:
        y: Tensor = _apply(x, f.A, f.B, f, seed)
        return y
    return computed(x, f, seed, _NO_GRADIENTS)[0]


class FewRows(torch.autograd.Function):
    """apply(x, A, B, f, seed) → y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, f: Factors, seed: int | Tensor | None
    ) -> Tensor:
        y, saved = computed(x, f, seed, ctx.needs_input_grad[:3])
        x_read, S, mask, *parameters = saved
        ctx.save_for_backward(x_as_it_is(x_read), S, mask, *as_they_are(parameters))
        ctx.call = f[7], A.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or is_vmap_active() or is_of_autograd(dY):
            return _differentiable_once(ctx, dY)  # as in autograd.py
        dX, dA, dB = gradients(dY, _new(FewSaved, ctx.saved_tensors), *ctx.call)
        return dX, dA, dB, None, None


# As in autograd.py.
_apply = super(torch.autograd.Function, FewRows).apply
_node: Any = FewRows
_node._backward_cls.apply = FewRows.backward
_differentiable_once = differentiable_once(FewRows.backward)
