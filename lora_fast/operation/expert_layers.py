"""Experts of a mixture with adapters, and their gradients: one projection, or a whole block.

Saved for backward, beside parameters: x [T, H], the rows before the gate [T · k, P], S of both
projections, and the routing; h, the experts' outputs and everything else is rebuilt. An NF4 weight
stays packed and is decoded again, except where checkpointing recomputes (:mod:`recomputation`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.selection import experts_for
from ..backends.torch_experts import BlockNeeds, BlockSaved, ProjectionNeeds
from ..backends.torch_gates import Gate
from ..experts.nf4_experts import NF4Experts
from ..experts.operands import Projection, Routing, sort_by_expert
from . import recomputation
from .autograd import is_recording
from .saved_leaves import as_they_are
from .second_derivatives import differentiable_once
from .selective import are_modes_active, as_one, is_observed, unobserved

# The tensors of a projection among the arguments of apply(): weight, bias, A, B.
_PER_PROJECTION = 4


@as_one
def project(x: Tensor, offsets: Tensor, projection: Projection) -> Tensor:
    """y [T, N] of x [T, K] in the compute dtype, its rows sorted by expert; all checked before."""
    if not is_recording():
        way = experts_for(x, projection)
        return way.project_forward(x, offsets, projection, ProjectionNeeds())[0]
    return AdaptedExperts.apply(x, offsets, projection, *_tensors(projection))


def block(
    x: Tensor,
    top_k_index: Tensor,
    w: Tensor,
    first: Projection,
    second: Projection,
    gate: Gate,
    *,
    complete: bool = False,
) -> Tensor:
    """out [T, H] of x [T, H] in the compute dtype, all checked before. `complete`: every index is
    known to name an expert."""
    if are_modes_active() and is_observed():
        with unobserved():
            return block(x, top_k_index, w, first, second, gate, complete=complete)
    routing = sort_by_expert(top_k_index, first.weight.shape[0], complete=complete)
    if not is_recording():
        way = experts_for(x, first, second)
        return way.block_forward(x, w, routing, first, second, gate, None)[0]
    tensors = (*_tensors(first), *_tensors(second))
    return ExpertsBlock.apply(x, w, routing, first, second, gate, *tensors)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's where it is on, else that of x."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


class AdaptedExperts(torch.autograd.Function):
    """apply(x, offsets, projection, weight, bias, A, B) → y; the tensors are the projection's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, offsets: Tensor, projection: Projection, *tensors: Tensor | None
    ) -> Tensor:
        needs = ProjectionNeeds(*ctx.needs_input_grad[4:])
        ctx.way = experts_for(x, projection)
        ctx.decoded = _decoded_again((projection, ctx.needs_input_grad[0]))
        (read_by,) = _remembering(ctx.decoded, projection)
        y, S = ctx.way.project_forward(x, offsets, read_by, needs)
        weights = recomputation.saved_weights([read_by] * len(ctx.decoded), x)
        read = x if needs.A else None
        ctx.save_for_backward(read, S, offsets, *as_they_are(tensors), *weights)
        ctx.unsaved = _unsaved(projection)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, S, offsets, *tensors = ctx.saved_tensors
        needs = ProjectionNeeds(*ctx.needs_input_grad[4:])
        projection = _restored(ctx.unsaved, tensors)
        if ctx.decoded:
            (projection,) = _with_saved(ctx.decoded, [projection], tensors)
        dX, found = ctx.way.project_backward(
            dY, x, S, offsets, projection, needs,
            needs_x=ctx.needs_input_grad[0],
        )  # fmt: skip
        return dX, None, None, None, *found


class ExpertsBlock(torch.autograd.Function):
    """apply(x, w, routing, first, second, gate, weight1, bias1, A1, B1, weight2, …) → out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        routing: Routing,
        first: Projection,
        second: Projection,
        gate: Gate,
        *tensors: Tensor | None,
    ) -> Tensor:
        needs = _block_needs(ctx.needs_input_grad)
        ctx.way = experts_for(x, first, second)
        read_by, weights = [first, second], []
        ctx.decoded = []
        if type(first.weight) is NF4Experts or type(second.weight) is NF4Experts:
            goes_on = needs.x or any(needs.first)
            reads_second = goes_on or needs.w or needs.second.A
            ctx.decoded = _decoded_again((first, needs.x), (second, reads_second))
            read_by = _remembering(ctx.decoded, first, second)
        out, saved = ctx.way.block_forward(x, w, routing, *read_by, gate, needs)
        assert saved is not None
        if ctx.decoded:
            weights = recomputation.saved_weights([read_by[i] for i in ctx.decoded], x)
        read = x if needs.first.A else None
        ctx.save_for_backward(read, w, *routing[:3], *saved, *as_they_are(tensors), *weights)
        ctx.unsaved, ctx.gate = (_unsaved(first), _unsaved(second)), gate
        ctx.complete = routing.complete
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, w, order, token, offsets, rows, S1, S2, *tensors = ctx.saved_tensors
        first = _restored(ctx.unsaved[0], tensors)
        second = _restored(ctx.unsaved[1], tensors[_PER_PROJECTION:])
        if ctx.decoded:
            first, second = _with_saved(ctx.decoded, [first, second], tensors)
        dx, dw, of_first, of_second = ctx.way.block_backward(
            dout, x, w, Routing(order, token, offsets, ctx.complete), BlockSaved(rows, S1, S2),
            first, second, ctx.gate, _block_needs(ctx.needs_input_grad),
        )  # fmt: skip
        return dx, dw, None, None, None, None, None, *of_first, None, *of_second


def _tensors(projection: Projection) -> tuple[Tensor | None, ...]:
    """What autograd saves of a projection, in the order of its fields."""
    weight = projection.weight
    dense = weight if isinstance(weight, Tensor) else None
    return (dense, projection.bias, projection.A, projection.B)


def _unsaved(projection: Projection) -> tuple[Any, float]:
    weight = projection.weight
    return None if isinstance(weight, Tensor) else weight, projection.scaling


def _decoded_again(*asked: tuple[Projection, bool]) -> list[int]:
    """The projections whose NF4 weight a recomputed forward pass decodes for its backward pass, of
    those with whether backward multiplies with W."""
    found = [i for i, (p, reads) in enumerate(asked) if reads and isinstance(p.weight, NF4Experts)]
    return found if found and recomputation.is_checkpointed_or_recomputed() else []


def _remembering(decoded: list[int], *projections: Projection) -> list[Projection]:
    found = [*projections]
    for i in decoded:
        (found[i],) = recomputation.remembering([found[i]])
    return found


def _with_saved(decoded: list[int], projections: list[Projection], tensors: Any) -> Any:
    """The projections with the W that were saved, behind the tensors of all."""
    found, weights = [*projections], tensors[_PER_PROJECTION * len(projections) :]
    for i, W in zip(decoded, weights, strict=True):
        (found[i],) = recomputation.with_saved([found[i]], [W])
    return found


def _restored(unsaved: tuple[Any, float], tensors: Any) -> Projection:
    packed, scaling = unsaved
    weight, bias, A, B = tensors[:_PER_PROJECTION]
    return Projection(packed if weight is None else weight, bias, A, B, scaling)


def _block_needs(needs_input_grad: tuple[bool, ...]) -> BlockNeeds:
    x, w, _, _, _, _, *rest = needs_input_grad
    return BlockNeeds(x, w, ProjectionNeeds(*rest[1:4]), ProjectionNeeds(*rest[5:8]))
