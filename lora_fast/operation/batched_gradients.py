"""Gradients for a batch of dYs: each of its members by itself.

``is_grads_batched=True``, ``jacobian(…, vectorize=True)`` and ``torch.vmap`` over a backward pass
give dY as a tensor without its batch dimension, of which only torch's own operations know: neither
kernels nor results written in place do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_Gradients = Callable[..., tuple[Tensor | None, ...]]
# Whether dY is one of autograd's own batches; torch.vmap has others. Both are asked before every
# backward pass.
is_of_autograd = torch._C._functorch.is_legacy_batchedtensor
is_vmap_active = torch._C._are_functorch_transforms_active
# More than anybody nests.
_LEVELS = range(1, 9)


def gradients_of_batch(
    gradients: _Gradients, ctx: Any, dYs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """``gradients(ctx, *dYs)`` of a Function for a batch of dYs."""
    return _of_each(gradients, _Shared(ctx), dYs)


def _of_each(
    gradients: _Gradients, ctx: Any, dYs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    if is_vmap_active():
        found = _Found()
        made = _Batched.apply(gradients, ctx, found, *dYs)
        return tuple(None if i is None else made[i] for i in found.places)
    level = _level_of(dYs)
    if level is None:
        return gradients(ctx, *dYs)
    members = [dY is not None and is_of_autograd(dY) for dY in dYs]
    whole: list[Any] = list(dYs)
    for i, batched in enumerate(members):
        if batched:
            whole[i] = torch._remove_batch_dim(whole[i], level, 1, 0)
    size = next(len(dY) for dY, batched in zip(whole, members, strict=True) if batched)
    along = [0 if batched else None for batched in members]
    return tuple(
        None if t is None else torch._add_batch_dim(t, 0, level)
        for t in _stacked(gradients, ctx, whole, along, size)
    )


def _level_of(dYs: Sequence[Tensor | None]) -> int | None:
    """At which level of nested batches dYs are one; None if they are none."""
    batch = next((dY for dY in dYs if dY is not None and is_of_autograd(dY)), None)
    if batch is None:
        return None
    for level in _LEVELS:
        if not is_of_autograd(torch._remove_batch_dim(batch, level, 1, 0)):
            return level
    raise RuntimeError(
        "lora_fast computes no batches of batches of gradients: call torch.autograd.grad in a "
        "loop, or lora_fast.decelerate(model) for this pass"
    )


def _stacked(
    gradients: _Gradients,
    ctx: Any,
    dYs: Sequence[Tensor | None],
    along: Sequence[int | None],
    size: int,
) -> list[Tensor | None]:
    """The gradients of all members, by their dimension in each dY, one below the other."""
    of_members = []
    for i in range(size):
        member = [
            dY if dY is None or dim is None else dY.select(dim, i)
            for dY, dim in zip(dYs, along, strict=True)
        ]
        of_members.append(_of_each(gradients, ctx, member))
    columns = zip(*of_members, strict=True)
    return [None if column[0] is None else torch.stack(column) for column in columns]


class _Found:
    """Which gradient lies where among those that are not None."""

    places: Sequence[int | None] = ()

    def packed(self, found: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        made = [t for t in found if t is not None]
        numbers = iter(range(len(made)))
        self.places = [None if t is None else next(numbers) for t in found]
        return tuple(made)


class _Batched(torch.autograd.Function):
    """apply(gradients, ctx, found, *dYs) → the gradients that are not None."""

    @staticmethod
    def forward(
        gradients: _Gradients, ctx: Any, found: _Found, *dYs: Tensor | None
    ) -> tuple[Tensor, ...]:
        return found.packed(_of_each(gradients, ctx, dYs))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Sequence[int | None],
        gradients: _Gradients,
        ctx: Any,
        found: _Found,
        *dYs: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        made = found.packed(_stacked(gradients, ctx, dYs, in_dims[3:], info.batch_size))
        return made, (0,) * len(made)


class Once:
    """The context of a Function whose saved tensors are unpacked once, as hooks expect."""

    def __init__(self, ctx: Any) -> None:
        object.__setattr__(self, "_ctx", ctx)
        object.__setattr__(self, "saved_tensors", ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ctx, name, value)


class _Shared(Once):
    """One that several passes read, which must leave the saved tensors as they are."""

    is_hooked = True
