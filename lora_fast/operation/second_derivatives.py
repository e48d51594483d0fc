"""Gradients whose own derivative is refused, whichever way it is asked for.

With ``create_graph=True`` autograd goes on from gradients to what they were computed from. There
PyTorch's ``once_differentiable`` raises only if a derivative of everything is asked for: from some
tensors it finds no way back, and takes what the operation adds to it for zero. Here the way back
exists, and raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .batched_gradients import Once, gradients_of_batch, is_of_autograd, is_vmap_active

_REFUSED = (
    "lora_fast has no second derivative: a gradient that a fused layer computed with "
    "create_graph=True cannot be differentiated. Call lora_fast.decelerate(model) for this pass"
)
_Gradients = Callable[..., tuple[Tensor | None, ...]]


def differentiable_once(gradients: _Gradients, x: int | None = 0) -> _Gradients:
    """A Function's backward, ``gradients(ctx, *dYs)``, as one that may be called with autograd on.

    `x` is the position among the inputs of the one that is saved first, for whose gradients others
    than its own are computed; None if no gradient depends on it.
    """

    def backward(ctx: Any, *dYs: Tensor | None) -> tuple[Tensor | None, ...]:
        batched = is_vmap_active()
        for dY in dYs:
            batched = batched or (dY is not None and is_of_autograd(dY))
        if not torch.is_grad_enabled():
            return gradients_of_batch(gradients, ctx, dYs) if batched else gradients(ctx, *dYs)
        if batched:
            raise RuntimeError(_REFUSED)
        read = Once(ctx)
        with torch.no_grad():
            found = gradients(read, *dYs)
        saved = read.saved_tensors
        needs = ctx.needs_input_grad
        reads_x = x is not None and needs[x] and sum(needs) > 1
        # Without x, or with a copy of it, nothing leads back to where it came from.
        if reads_x and (saved[0] is None or not saved[0].requires_grad):
            raise RuntimeError(_REFUSED)
        # Parameters are saved without the way back to them (saved_leaves.py).
        leaves = (getattr(node, "variable", None) for node, _ in ctx.next_functions)
        read_from = (*dYs, *saved, *leaves)
        sources = [t for t in read_from if isinstance(t, Tensor) and t.requires_grad]
        places = [i for i, t in enumerate(found) if t is not None]
        made = _Refusing.apply(len(places), *(found[i] for i in places), *sources)
        results: list[Tensor | None] = [None] * len(found)
        for i, t in zip(places, made, strict=True):
            results[i] = t
        return tuple(results)

    return backward


class _Refusing(torch.autograd.Function):
    """apply(n, gradient_1 … gradient_n, sources …) → the gradients, connected to the sources."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(_REFUSED)
