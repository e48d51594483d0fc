"""Experts whose gate is code of their module, around that code.

    forward   rows by expert, S1, u · the module's h · S2, y, out
    backward  dy by expert, dB2, v = dy W2 + dS2 A2 · h once more · dw, dA2 · du of the module ·
              dS1, dB1, dA1, dx

What is before, between and behind the gate are operations of their own, which may be repeated; the
gate may call anything. Equations as in :mod:`torch_experts`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..experts.operands import Projection, Routing
from ..kernels import expert_gradients, expert_scatter, expert_shrink, expert_sums
from ..kernels.launch_plans import called
from . import triton_expert_products as products
from .torch_experts import BlockNeeds, BlockSaved, ProjectionGradients
from .torch_gates import Gate
from .torch_ops import without_autocast
from .triton_experts import Room, Through, before_gate, contiguous, gathered, transposed
from .triton_operands import Launching

# Of a key, the tensors and the projections of an operation, and what computes it.
Run = Callable[[Any, Sequence[Tensor | None], Sequence[Projection], Callable[[], Any]], Any]


def block_forward(
    x: Tensor,
    w: Tensor,
    routing: Routing,
    first: Projection,
    second: Projection,
    gate: Gate,
    needs: BlockNeeds | None,
    run: Run,
) -> tuple[Tensor, BlockSaved | None]:
    """:func:`lora_fast.backends.torch_experts.block_forward`."""
    order, offsets = routing.order, routing.offsets
    with Launching(x), without_autocast(x):
        before = functools.partial(_before, x, routing, first)
        u, S1, back = run("before", (x, order, offsets), (first,), before)
        h = gate.forward(u)
        behind = functools.partial(_behind, h, back, w, offsets, second)
        out, S2 = run("behind", (h, back, w, offsets), (second,), behind)
    if needs is None:
        return out, None
    return out, BlockSaved(u, S1 if needs.first.B else None, S2 if needs.second.B else None)


def block_backward(
    dout: Tensor,
    x: Tensor | None,
    w: Tensor,
    routing: Routing,
    saved: BlockSaved,
    first: Projection,
    second: Projection,
    gate: Gate,
    needs: BlockNeeds,
    run: Run,
) -> tuple[Tensor | None, Tensor | None, ProjectionGradients, ProjectionGradients]:
    """:func:`lora_fast.backends.torch_experts.block_backward`."""
    order, offsets = routing.order, routing.offsets
    dx = dw = dA2 = None
    of_first = ProjectionGradients()
    goes_on = needs.x or any(needs.first)
    with Launching(dout), without_autocast(dout):
        found = run(
            ("second", needs), (dout, w, order, offsets, saved.S2), (second,),
            functools.partial(_through_second, dout, w, routing, saved.S2, second, needs),
        )  # fmt: skip
        if found.v is not None:
            h, vjp = gate.rebuilt(saved.rows)
            operands = (found.v, h, found.dS, found.dots, w, order, offsets)
            at_gate = functools.partial(_at_gate, *operands, second, needs)
            dw, dA2 = run(("at", needs), operands, (second,), at_gate)
        if goes_on:
            of_rows = w.view(-1)[order].float().unsqueeze(1)
            du = vjp((found.v * of_rows).to(h.dtype))
            del h, vjp, operands, at_gate
            back, tokens, S1 = found.back, dout.shape[0], saved.S1
            found = found._replace(v=None)
            dx, of_first = run(
                ("first", needs, tokens), (du, x, S1, back, order, offsets), (first,),
                functools.partial(
                    _through_first, du, x, routing, S1, back, first, needs, tokens
                ),
            )  # fmt: skip
    return dx, dw, of_first, ProjectionGradients(found.dbias, dA2, found.dB)


def _before(x: Tensor, routing: Routing, first: Projection) -> tuple[Tensor, Tensor | None, Tensor]:
    """u [P, P1], S1 [P, R], and where each row went."""
    p = products.readable(first)
    widens = products.augments(p)
    found = expert_shrink.gather(
        x, routing.order, routing.offsets, transposed(p.A), widens=widens
    )  # fmt: skip
    u = products.output(found.rows, found.S, p, routing.offsets, widened=widens)
    return u, found.S, found.back


def _behind(
    h: Tensor, back: Tensor, w: Tensor, offsets: Tensor, second: Projection
) -> tuple[Tensor, Tensor | None]:
    """out [T, H] and S2 [P, R] of h [P, I]."""
    p = products.readable(second)
    rows, S2 = products.beside(h, offsets, p)
    y = products.output(rows, S2, p, offsets, widened=products.augments(p))
    return expert_scatter.scatter(y, back, offsets, w.shape[0], contiguous(w)), S2


class _Second(NamedTuple):
    """v [P, I] whole, dS2 [P, R], the bias's part of dw, where each row went; dB2 and dbias2."""

    v: Tensor | None
    dS: Tensor | None
    dots: Tensor | None
    back: Tensor
    dB: Tensor | None
    dbias: Tensor | None


def _through_second(
    dout: Tensor,
    w: Tensor,
    routing: Routing,
    S2: Tensor | None,
    second: Projection,
    needs: BlockNeeds,
) -> _Second:
    wants_v = needs.x or needs.w or any(needs.first) or needs.second.A
    p = products.readable(second)
    dy, dB, dbias = gathered(dout, contiguous(w), routing, S2, p, needs)
    v = products.input_gradient(dy.rows, dy.S, p, routing.offsets) if wants_v else None
    return _Second(v, dy.S, dy.dots, dy.back, dB, dbias)


def _at_gate(
    v: Tensor,
    h: Tensor,
    dS: Tensor | None,
    dots: Tensor | None,
    w: Tensor,
    order: Tensor,
    offsets: Tensor,
    second: Projection,
    needs: BlockNeeds,
) -> tuple[Tensor | None, Tensor | None]:
    """dw [T, k] and dA2 [E, R, I]."""
    dw = dA = None
    w = contiguous(w)
    if needs.w:
        _, dw = expert_sums.sums(offsets, order, None, called(_dots, v, h), dots, w=w)
    if needs.second.A:
        dA, _ = expert_gradients.gradients(
            h, dS, offsets, factor=second.A, is_A=True, order=order, w=w
        )
    return dw, dA


def _dots(v: Tensor, h: Tensor) -> Tensor:
    return torch.linalg.vecdot(v.float(), h.float()).unsqueeze(0)


def _through_first(
    du: Tensor,
    x: Tensor | None,
    routing: Routing,
    S1: Tensor | None,
    back: Tensor,
    first: Projection,
    needs: BlockNeeds,
    tokens: int,
) -> tuple[Tensor | None, ProjectionGradients]:
    """dx [T, H] and the gradients of the first projection."""
    p = products.readable(first)
    dX, found = before_gate(Through(Room(du)), x, routing, S1, p, needs)
    if dX is None:
        return None, found
    return expert_scatter.scatter(dX, back, routing.offsets, tokens), found
