"""Experts on the Triton backend: the rows of all experts in each launch, and nothing waits for the
offsets, which stay on the device.

    forward   rows by expert, their S1 · u = rows W1ᵀ · h, S2 · y = h W2ᵀ + low rank · out
    backward  dy by expert, dS2 · v = dy W2 · dw, du, dA2 · dB2 · dS1 · dx rows = du W1 + low rank ·
              dx · dA1, dB1

The equations and what is saved are those of :mod:`torch_experts`. Products with W are torch's
grouped ones where these are one launch, else those of expert_product, with the low rank in the same
sum; on a CPU, which runs kernels in tests, an expert after the other. A 4-bit weight is decoded
into a workspace of one projection, in forward and again in backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..experts.nf4_experts import NF4Experts
from ..experts.operands import Projection, Routing, spans
from ..kernels import (
    environment,
    expert_gate_backward,
    expert_gate_forward,
    expert_gate_gradients,
    expert_gradients,
    expert_product,
    expert_scatter,
    expert_shrink,
    expert_sums,
    gated_policy,
    nf4_decode,
    shrink,
)
from ..kernels.expert_gate_tiles import ExpertMember, Glu
from ..kernels.expert_product import LowRank
from . import triton_routes
from .torch_experts import BlockNeeds, BlockSaved, ProjectionGradients, ProjectionNeeds
from .torch_gates import Gate, GluGate
from .torch_low_rank import given
from .torch_ops import without_autocast
from .triton_operands import Launching

# A row of an operand of a grouped product starts at a multiple of 16 bytes.
_ALIGNED = 8
# Compute capabilities on which torch's grouped product is one launch; on others it waits for the
# offsets.
_GROUPED_ON = (9, 10)
_grouped: Any = getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def block_forward(
    x: Tensor,
    w: Tensor,
    routing: Routing,
    first: Projection,
    second: Projection,
    gate: Gate,
    needs: BlockNeeds | None,
) -> tuple[Tensor, BlockSaved | None]:
    """:func:`lora_fast.backends.torch_experts.block_forward`."""
    offsets = routing.offsets
    with Launching(x), without_autocast(x):
        first, second = _readable(first), _readable(second)
        in_gate, widens = isinstance(gate, GluGate), _augments(first)
        found = expert_shrink.gather(
            x, routing.order, offsets, _transposed(first.A), widens=widens and not in_gate
        )
        if in_gate:  # its kernel adds the low rank and the bias
            u = _product(found.rows, _dense(first, x.dtype), offsets)
        else:
            u = _output(found.rows, found.S, first, offsets, widened=widens)
        found = found._replace(rows=None)
        h, S2 = _gated(u, found.S, offsets, first, second, gate)
        y = _output(h, S2, second, offsets, widened=_augments(second))
        out = expert_scatter.scatter(y, found.back, offsets, x.shape[0], w.contiguous())
    if needs is None:
        return out, None
    # A kernel of the gate adds the low rank to u once more in backward.
    S1 = found.S if needs.first.B or isinstance(gate, GluGate) else None
    return out, BlockSaved(u, S1, S2 if needs.second.B else None)


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
) -> tuple[Tensor | None, Tensor | None, ProjectionGradients, ProjectionGradients]:
    """:func:`lora_fast.backends.torch_experts.block_backward`."""
    offsets, dtype, tokens = routing.offsets, dout.dtype, dout.shape[0]
    sorted_by: dict[str, Any] = {"order": routing.order, "gathers": True}
    dx = dw = None
    of_first = ProjectionGradients()
    goes_on = needs.x or any(needs.first)
    with Launching(dout), without_autocast(dout):
        first, second = _readable(first), _readable(second)
        w = w.contiguous()
        vector = second.bias if needs.w else None
        dy = expert_shrink.gather(
            dout, routing.order, offsets, second.B, second.scaling, vector=vector, is_grad=True
        )
        dB2, dbias2 = expert_gradients.gradients(
            dout, saved.S2, offsets, scaling=second.scaling, w=w, **sorted_by,
            factor=second.B if needs.second.B else None,
            bias=second.bias if needs.second.bias else None,
        )  # fmt: skip
        dA2 = None
        if goes_on or needs.w or needs.second.A:
            v = _product(dy.rows, _dense(second, dtype).mT, offsets)
            dy = dy._replace(rows=None)
            through = _gate_gradients(v, dy, w, routing, saved, first, second, gate, needs)
            dA2, dw = through.second_A, through.dw
        if goes_on:
            dX, of_first = _before_gate(through, x, routing, saved.S1, first, needs)
            if dX is not None:
                dx = expert_scatter.scatter(dX, dy.back, offsets, tokens)
    return dx, dw, of_first, ProjectionGradients(dbias2, dA2, dB2)


def project_forward(
    x: Tensor, offsets: Tensor, projection: Projection, needs: ProjectionNeeds
) -> tuple[Tensor, Tensor | None]:
    """:func:`lora_fast.backends.torch_experts.project_forward`."""
    with Launching(x), without_autocast(x):
        p = _readable(projection)
        rows, S = _beside(x, offsets, p)
        y = _output(rows, S, p, offsets, widened=_augments(p), clears=True)
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
        p = _readable(projection)
        dS = _shrunk(dY, offsets, p.B, p.scaling) if needs_x or needs.A else None
        if needs_x:
            low_rank = None if dS is None else LowRank(dS, given(p.A).mT)
            dX = _product(dY, _dense(p, dY.dtype).mT, offsets, low_rank, clears=True)
        found = _factor_gradients(dY, dS, x, S, offsets, p, needs)
    return dX, found


class _Through(NamedTuple):
    """The gradients around the gate: du [P, P1], and dw [T, k], dS1, dB1 and dA2, or None where
    they were not asked for, or the launch does not make them."""

    du: Tensor
    dw: Tensor | None = None
    dS1: Tensor | None = None
    first_B: Tensor | None = None
    second_A: Tensor | None = None


def _gated(
    u: Tensor, S1: Tensor | None, offsets: Tensor, first: Projection, second: Projection, gate: Gate
) -> tuple[Tensor, Tensor | None]:
    """h [P, I], or [h | S2 | 0] for a weight that takes it so, and S2. u [P, P1] is the base
    product, or for a gate that its module computes the whole one."""
    if isinstance(gate, GluGate):
        h, S2 = expert_gate_forward.activate(
            _member(u, S1, first), offsets, Glu(*gate.form), second.A, widens=_augments(second)
        )
        return h, S2
    return _beside(gate.forward(u), offsets, second)


def _member(u: Tensor, S1: Tensor | None, first: Projection) -> ExpertMember:
    # Every tile of rows reads B again, which PEFT stores with the index of the experts last.
    B = None if first.B is None else first.B.contiguous()
    return ExpertMember(u, S1, B, first.bias, first.scaling)


def _gate_gradients(
    v: Tensor,
    dy: expert_shrink.Gathered,
    w: Tensor,
    routing: Routing,
    saved: BlockSaved,
    first: Projection,
    second: Projection,
    gate: Gate,
    needs: BlockNeeds,
) -> _Through:
    """The gradients around the gate for v [P, I], the base product dy W2, and dS2 [P, R]."""
    if isinstance(gate, GluGate):
        glu = Glu(*gate.form)
        ranks = [0 if p.A is None else p.A.shape[1] for p in (first, second)]
        arch = environment.current_arch()
        fits = gated_policy.fits_experts(v.dtype, ranks, arch, plain=glu.is_plain)
        through = _by_strips if fits else _by_tiles
        return through(v, dy, w, routing, saved, first, second, glu, needs)
    offsets, dw, dA = routing.offsets, None, None
    if dy.S is not None:
        expert_product.add_(v, offsets, LowRank(dy.S, given(second.A).mT))
    h, vjp = gate.rebuilt(saved.rows)
    if needs.w:
        parts = torch.linalg.vecdot(v.float(), h.float()).unsqueeze(0)
        _, dw = expert_sums.sums(offsets, routing.order, None, parts, dy.dots, w=w)
    if needs.second.A:
        dA, _ = expert_gradients.gradients(
            h, dy.S, offsets, factor=second.A, is_A=True, order=routing.order, w=w
        )
    of_rows = w.view(-1)[routing.order].float().unsqueeze(1)
    return _Through(vjp((v * of_rows).to(h.dtype)), dw, second_A=dA)


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
) -> _Through:
    """All of them in one launch, and one that adds the parts of its programs."""
    wants_dS = first.A is not None and (needs.x or needs.first.A)
    found = expert_gate_backward.gradients(
        _member(saved.rows, saved.S1, first), v, w, routing.order, routing.offsets, glu, dy.S,
        second.A, out=torch.empty_like(saved.rows),
        wanted=expert_gate_backward.Wanted(needs.first.B, needs.second.A, wants_dS, needs.w),
    )  # fmt: skip
    dS1 = dw = None
    if found.dS is not None or found.dw is not None:
        dS1, dw = expert_sums.sums(
            routing.offsets, routing.order, found.dS, found.dw, dy.dots, dtype=v.dtype, w=w
        )
    return _Through(found.du, dw, dS1, found.B, found.A)


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
) -> _Through:
    """du and dw in one launch, which leaves w h in the memory of v."""
    offsets, order, dw, dA = routing.offsets, routing.order, None, None
    du = torch.empty_like(saved.rows)
    parts = expert_gate_gradients.gradients(
        _member(saved.rows, saved.S1, first), v, w, order, offsets, glu, dy.S, second.A,
        out=du, stores_h=needs.second.A, needs_w=needs.w,
    )  # fmt: skip
    if parts is not None:
        _, dw = expert_sums.sums(offsets, order, None, parts, dy.dots, w=w)
    if needs.second.A:
        dA, _ = expert_gradients.gradients(v, dy.S, offsets, factor=second.A, is_A=True)
    return _Through(du, dw, second_A=dA)


def _before_gate(
    through: _Through,
    x: Tensor | None,
    routing: Routing,
    S1: Tensor | None,
    first: Projection,
    needs: BlockNeeds,
) -> tuple[Tensor | None, ProjectionGradients]:
    """The rows of dx [P, H] and the gradients of the first projection."""
    du, dS, offsets, dX = through.du, through.dS1, routing.offsets, None
    of = needs.first
    if dS is None and (needs.x or of.A):
        dS = _shrunk(du, offsets, first.B, first.scaling)
    if needs.x:
        low_rank = None if dS is None else LowRank(dS, given(first.A).mT)
        dX = _product(du, _dense(first, du.dtype).mT, offsets, low_rank)
    wanted = of._replace(B=of.B and through.first_B is None)
    found = _factor_gradients(du, dS, x, S1, offsets, first, wanted, routing.order)
    return dX, found if through.first_B is None else found._replace(B=through.first_B)


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


def _readable(p: Projection) -> Projection:
    """With a B whose rows lie side by side: PEFT stores the experts' index last, and every tile of
    an expert would read the sectors of others."""
    return p if p.B is None else p._replace(B=p.B.contiguous())


def _augments(p: Projection) -> bool:
    """Whether W is decoded into a workspace [W | s · B | 0], a product of which with [x | S | 0] is
    the whole output."""
    return isinstance(p.weight, NF4Experts) and not p.weight.transposed and p.A is not None


def _beside(rows: Tensor, offsets: Tensor, p: Projection) -> tuple[Tensor, Tensor | None]:
    """Rows of the product with p's weight, [rows | S | 0] or as they are, and S."""
    widens = _augments(p)
    if p.A is None:
        return rows, None
    found = expert_shrink.gather(rows, None, offsets, p.A.mT, stores_rows=widens, widens=widens)
    return (found.rows if widens else rows), found.S


def _output(
    rows: Tensor,
    S: Tensor | None,
    p: Projection,
    offsets: Tensor,
    *,
    widened: bool,
    clears: bool = False,
) -> Tensor:
    """rows W[e]ᵀ + s · S B[e]ᵀ + bias[e] [P, N], for rows [x | S | 0] if they are `widened`."""
    weight: Any = p.weight
    if not widened:
        low_rank = _low_rank(S, p.B, p)
        return _product(rows, _dense(p, rows.dtype), offsets, low_rank, p.bias, clears=clears)
    W = nf4_decode.augmented(
        weight.packed, weight.quant_state, rows.dtype, given(p.B).flatten(0, 1), p.scaling,
        columns=shrink.padding_of(given(p.A).shape[1]),
    )  # fmt: skip
    return _product(rows, W, offsets, None, p.bias, clears=clears)


def _transposed(A: Tensor | None) -> Tensor | None:
    return None if A is None else A.mT


def _low_rank(S: Tensor | None, factor: Tensor | None, p: Projection) -> LowRank | None:
    return None if S is None else LowRank(S, given(factor), p.scaling)


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


def _dense(p: Projection, dtype: torch.dtype) -> Tensor:
    """W [E, N, K] in any dtype; of a 4-bit weight decoded to `dtype`, in one launch."""
    weight = p.weight
    if not isinstance(weight, NF4Experts):
        return weight
    W: Tensor = nf4_decode.decode(weight.packed, weight.quant_state, dtype)
    return W.mT if weight.transposed else W


def _product(
    rows: Tensor,
    W: Tensor,
    offsets: Tensor,
    low_rank: LowRank | None = None,
    bias: Tensor | None = None,
    *,
    clears: bool = False,
) -> Tensor:
    """rows [P, K] W[e]ᵀ for W [E, L, K], with a low-rank part and a bias. Rows of no expert are
    zeros if there is either, or with `clears`; else nobody may read them."""
    if rows.device.type == "cpu":
        out = _one_by_one(rows, W, offsets)
    elif _is_one_launch(rows, W):
        W = W if W.dtype == rows.dtype else W.to(rows.dtype)
        out = _grouped(rows, W.mT, offs=offsets.int())
    else:
        made: Tensor = expert_product.product(rows, W, offsets, low_rank, bias)
        return made
    if clears or low_rank is not None or bias is not None:
        expert_product.add_(out, offsets, low_rank, bias)
    return out


def _is_one_launch(rows: Tensor, W: Tensor) -> bool:
    """Whether torch's grouped product takes these operands, in one launch."""
    if _grouped is None or rows.dtype is not torch.bfloat16 or rows.stride(-1) != 1:
        return False
    if any(size % _ALIGNED for size in (*W.shape[1:], rows.stride(0))):
        return False
    arch = environment.current_arch()
    return arch is not None and arch // 10 in _GROUPED_ON


def _one_by_one(rows: Tensor, W: Tensor, offsets: Tensor) -> Tensor:
    out = rows.new_zeros(rows.shape[0], W.shape[1])
    for expert, start, stop in spans(offsets, rows.shape[0]):
        of_one = W[expert].to(rows.dtype)
        out[start:stop] = triton_routes.add_product(None, rows[start:stop], of_one.mT)
    return out
