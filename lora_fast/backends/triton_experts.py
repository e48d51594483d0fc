"""Experts on the Triton backend: the rows of all experts in each launch, and nothing waits for the
offsets, which stay on the device.

    forward   rows by expert, their S1 · u = rows W1ᵀ · h, S2 · y = h W2ᵀ + low rank · out
    backward  dy by expert, dS2 · v = dy W2 · dw, du, dA2 · dB2 · dS1 · dx rows = du W1 + low rank ·
              dx · dA1, dB1

The equations and what is saved are those of :mod:`torch_experts`. Products with W are those
of :mod:`triton_expert_products`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..experts.operands import Projection, Routing
from ..kernels import (
    environment,
    expert_gate_backward,
    expert_gate_forward,
    expert_gate_gradients,
    expert_gradients,
    expert_scatter,
    expert_shrink,
    expert_sums,
    gated_policy,
    shrink,
)
from ..kernels.expert_gate_tiles import ExpertMember, Glu
from ..kernels.launch_plans import called, empty
from . import triton_expert_products as products
from .torch_experts import BlockNeeds, BlockSaved, ProjectionGradients, ProjectionNeeds
from .torch_gates import GluGate
from .torch_low_rank import given
from .torch_ops import without_autocast
from .triton_operands import Launching


def block_forward(
    x: Tensor,
    w: Tensor,
    routing: Routing,
    first: Projection,
    second: Projection,
    gate: GluGate,
    needs: BlockNeeds | None,
) -> tuple[Tensor, BlockSaved | None]:
    """:func:`lora_fast.backends.torch_experts.block_forward`."""
    offsets = routing.offsets
    with Launching(x), without_autocast(x):
        first, second = products.readable(first), products.readable(second)
        found = expert_shrink.gather(x, routing.order, offsets, transposed(first.A))
        # The kernel of the gate adds the low rank and the bias.
        u = products.product(found.rows, products.dense(first, x.dtype), offsets)
        found = found._replace(rows=None)
        h, S2 = expert_gate_forward.activate(
            _member(u, found.S, first), offsets, Glu(*gate.form), second.A,
            widens=products.augments(second),
        )  # fmt: skip
        y = products.output(h, S2, second, offsets, widened=products.augments(second))
        out = expert_scatter.scatter(y, found.back, offsets, x.shape[0], contiguous(w))
    if needs is None:
        return out, None
    # A kernel of the gate adds the low rank to u once more in backward.
    return out, BlockSaved(u, found.S, S2 if needs.second.B else None)


def block_backward(
    dout: Tensor,
    x: Tensor | None,
    w: Tensor,
    routing: Routing,
    saved: BlockSaved,
    first: Projection,
    second: Projection,
    gate: GluGate,
    needs: BlockNeeds,
) -> tuple[Tensor | None, Tensor | None, ProjectionGradients, ProjectionGradients]:
    """:func:`lora_fast.backends.torch_experts.block_backward`."""
    offsets, tokens = routing.offsets, dout.shape[0]
    dx = dw = dA2 = None
    of_first = ProjectionGradients()
    goes_on = needs.x or any(needs.first)
    with Launching(dout), without_autocast(dout):
        first, second, w = products.readable(first), products.readable(second), contiguous(w)
        dy, dB2, dbias2 = gathered(dout, w, routing, saved.S2, second, needs)
        if goes_on or needs.w or needs.second.A:
            v = products.input_gradient(dy.rows, None, second, offsets)
            dy = dy._replace(rows=None)
            through = _gate_gradients(v, dy, w, routing, saved, first, second, gate, needs)
            dA2, dw = through.second_A, through.dw
        if goes_on:
            dX, of_first = before_gate(through, x, routing, saved.S1, first, needs)
            if dX is not None:
                dx = expert_scatter.scatter(dX, dy.back, offsets, tokens)
    return dx, dw, of_first, ProjectionGradients(dbias2, dA2, dB2)


def gathered(
    dout: Tensor,
    w: Tensor,
    routing: Routing,
    S2: Tensor | None,
    second: Projection,
    needs: BlockNeeds,
) -> tuple[expert_shrink.Gathered, Tensor | None, Tensor | None]:
    """The rows of dout by expert with their dS2, dB2 and dbias2; w is contiguous, and `second`
    readable."""
    order, offsets = routing.order, routing.offsets
    dy = expert_shrink.gather(
        dout, order, offsets, second.B, second.scaling,
        vector=second.bias if needs.w else None, is_grad=True,
    )  # fmt: skip
    dB2, dbias2 = expert_gradients.gradients(
        dout, S2, offsets, scaling=second.scaling, w=w, order=order, gathers=True,
        factor=second.B if needs.second.B else None,
        bias=second.bias if needs.second.bias else None,
    )  # fmt: skip
    return dy, dB2, dbias2


def project_forward(
    x: Tensor, offsets: Tensor, projection: Projection, needs: ProjectionNeeds
) -> tuple[Tensor, Tensor | None]:
    """:func:`lora_fast.backends.torch_experts.project_forward`."""
    with Launching(x), without_autocast(x):
        p = products.readable(projection)
        rows, S = products.beside(x, offsets, p)
        y = products.output(rows, S, p, offsets, widened=products.augments(p), clears=True)
    return y, S if needs.B else None


def project_backward(
    dY: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    offsets: Tensor,
    projection: Projection,
    needs: ProjectionNeeds,
    *,
    needs_x: bool,
) -> tuple[Tensor | None, ProjectionGradients]:
    """:func:`lora_fast.backends.torch_experts.project_backward`."""
    dX = None
    with Launching(dY), without_autocast(dY):
        p = products.readable(projection)
        dS = _shrunk(dY, offsets, p.B, p.scaling) if needs_x or needs.A else None
        if needs_x:
            dX = products.input_gradient(dY, dS, p, offsets, clears=True)
        found = _factor_gradients(dY, dS, x, S, offsets, p, needs)
    return dX, found


class Room(NamedTuple):
    """du [P, P1], and the memory [P, P1 + padding] in whose first columns it lies, where dS1 beside
    it makes dx one product."""

    du: Tensor
    wide: Tensor | None = None


class Through(NamedTuple):
    """The gradients around the gate: du, and dw [T, k], dS1, dB1 and dA2, or None where
    they were not asked for, or the launch does not make them."""

    du: Room
    dw: Tensor | None = None
    dS1: Tensor | None = None
    first_B: Tensor | None = None
    second_A: Tensor | None = None


def _member(u: Tensor, S1: Tensor | None, first: Projection) -> ExpertMember:
    return ExpertMember(u, S1, first.B, first.bias, first.scaling)


def _gate_gradients(
    v: Tensor,
    dy: expert_shrink.Gathered,
    w: Tensor,
    routing: Routing,
    saved: BlockSaved,
    first: Projection,
    second: Projection,
    gate: GluGate,
    needs: BlockNeeds,
) -> Through:
    """The gradients around the gate for v [P, I], the base product dy W2, and dS2 [P, R]."""
    glu = Glu(*gate.form)
    ranks = [0 if p.A is None else p.A.shape[1] for p in (first, second)]
    fits = gated_policy.fits_experts(v.dtype, ranks, environment.current_arch(), plain=glu.is_plain)
    by = _by_strips if fits else _by_tiles
    return by(v, dy, w, routing, saved, first, second, glu, needs)


def _by_strips(
    v: Tensor,
    dy: expert_shrink.Gathered,
    w: Tensor,
    routing: Routing,
    saved: BlockSaved,
    first: Projection,
    second: Projection,
    glu: Glu,
    needs: BlockNeeds,
) -> Through:
    """All of them in one launch, and one that adds the parts of its programs."""
    room = _room(saved.rows, first, needs)
    wants_dS = first.A is not None and (needs.x or needs.first.A)
    found = expert_gate_backward.gradients(
        _member(saved.rows, saved.S1, first), v, w, routing.order, routing.offsets, glu, dy.S,
        second.A, out=room.du,
        wanted=expert_gate_backward.Wanted(needs.first.B, needs.second.A, wants_dS, needs.w),
    )  # fmt: skip
    dS1 = dw = None
    if found.dS is not None or found.dw is not None:
        dS1, dw = expert_sums.sums(
            routing.offsets, routing.order, found.dS, found.dw, dy.dots, dtype=v.dtype, w=w
        )
    return Through(room, dw, dS1, found.B, found.A)


def _room(rows: Tensor, first: Projection, needs: BlockNeeds) -> Room:
    (P, width), dtype = rows.shape, rows.dtype
    # In float16 dS has to be scaled before it becomes an operand.
    if not needs.x or not products.augments(first) or dtype is torch.float16:
        return Room(empty(rows, P, width))
    wide = empty(rows, P, width + shrink.padding_of(given(first.A).shape[1]))
    return Room(wide[:, :width], wide)


def _by_tiles(
    v: Tensor,
    dy: expert_shrink.Gathered,
    w: Tensor,
    routing: Routing,
    saved: BlockSaved,
    first: Projection,
    second: Projection,
    glu: Glu,
    needs: BlockNeeds,
) -> Through:
    """du and dw in one launch, which leaves w h in the memory of v."""
    offsets, order, dw, dA = routing.offsets, routing.order, None, None
    room = _room(saved.rows, first, needs)
    parts = expert_gate_gradients.gradients(
        _member(saved.rows, saved.S1, first), v, w, order, offsets, glu, dy.S, second.A,
        out=room.du, stores_h=needs.second.A, needs_w=needs.w,
    )  # fmt: skip
    if parts is not None:
        _, dw = expert_sums.sums(offsets, order, None, parts, dy.dots, w=w)
    if needs.second.A:
        dA, _ = expert_gradients.gradients(v, dy.S, offsets, factor=second.A, is_A=True)
    return Through(room, dw, second_A=dA)


def before_gate(
    through: Through,
    x: Tensor | None,
    routing: Routing,
    S1: Tensor | None,
    first: Projection,
    needs: BlockNeeds,
) -> tuple[Tensor | None, ProjectionGradients]:
    """The rows of dx [P, H] and the gradients of the first projection."""
    (du, wide), dS, offsets, dX = through.du, through.dS1, routing.offsets, None
    of = needs.first
    if dS is None and (needs.x or of.A):
        dS = _shrunk(du, offsets, first.B, first.scaling)
    if needs.x and wide is not None:
        called(_put_behind, wide, given(dS), first=du.shape[1])
        dX = products.product(wide, products.turned(first, du.dtype), offsets)
    elif needs.x:
        dX = products.input_gradient(du, dS, first, offsets)
    wanted = of._replace(B=of.B and through.first_B is None)
    found = _factor_gradients(du, dS, x, S1, offsets, first, wanted, routing.order)
    return dX, found if through.first_B is None else found._replace(B=through.first_B)


def _put_behind(wide: Tensor, S: Tensor, first: int) -> Tensor:
    """S and zeros in the columns of wide from `first` on."""
    behind, R = wide[:, first:], S.shape[1]
    behind[:, :R] = S
    behind[:, R:] = 0.0
    return wide


def _factor_gradients(
    dY: Tensor,
    dS: Tensor | None,
    x: Tensor | None,
    S: Tensor | None,
    offsets: Tensor,
    p: Projection,
    needs: ProjectionNeeds,
    order: Tensor | None = None,
) -> ProjectionGradients:
    """Of the rows dY [P, N]; with an order x [T, K] has the tokens."""
    dB, dbias = expert_gradients.gradients(
        dY, S, offsets, scaling=p.scaling, factor=p.B if needs.B else None,
        bias=p.bias if needs.bias else None,
    )  # fmt: skip
    dA = None
    if needs.A:
        dA, _ = expert_gradients.gradients(
            given(x), dS, offsets, factor=p.A, is_A=True, order=order, gathers=order is not None
        )
    return ProjectionGradients(dbias, dA, dB)


def contiguous(w: Tensor) -> Tensor:
    return w if w.is_contiguous() else called(Tensor.contiguous, w)


def transposed(A: Tensor | None) -> Tensor | None:
    return None if A is None else A.mT


def _shrunk(
    rows: Tensor, offsets: Tensor, factor: Tensor | None, scaling: float | None = None
) -> Tensor | None:
    """S [P, R] of rows that are sorted, for a factor [E, K, R]; with a scaling that of a
    gradient."""
    if factor is None:
        return None
    is_grad = scaling is not None
    found = expert_shrink.gather(
        rows, None, offsets, factor, 1.0 if scaling is None else scaling, stores_rows=False,
        is_grad=is_grad,
    )  # fmt: skip
    S: Tensor = found.S
    return S
