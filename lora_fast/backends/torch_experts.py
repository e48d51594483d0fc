"""Experts in aten calls: an expert at a time, with everything of it in the cache.

    u_r = W1_e x_t + s (B1_e A1_e) x_t + bias1_e      h_r = gate(u_r)       for row r of token t
    y_r = W2_e h_r + s (B2_e A2_e) h_r + bias2_e      out_t = Σ_r w_r y_r   at its expert e

    backward, with v_r = (W2_e + s B2_e A2_e)ᵀ dout_t :
    dw_r = ⟨v_r, h_r⟩ + ⟨bias2_e, dout_t⟩      du_r = w_r gate'(u_r) v_r
    dx_t = Σ_r (W1_e + s B1_e A1_e)ᵀ du_r
    and the factors' gradients as in torch_low_rank.py, with S2 and h scaled by w instead of dout.

The rows of an expert are gathered, go through both projections and are added to their tokens before
the next expert's, in rising order of the experts: bitwise reproducible, and no tensor of all rows
but what is saved. Neither W + s B A nor a gradient of W is made.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..experts.operands import Projection, Routing, spans
from ..factors import Factors, Needs, Saved
from .torch_gates import Gate
from .torch_low_rank import given
from .torch_ops import TORCH, without_autocast
from .torch_products import wide_dtype

_NOTHING = (Needs(),)
_SAVES_S = (Needs(B=True),)


class ProjectionNeeds(NamedTuple):
    """The gradients of a projection that are required."""

    bias: bool = False
    A: bool = False
    B: bool = False


class BlockNeeds(NamedTuple):
    """The gradients of a block of experts that are required."""

    x: bool = False
    w: bool = False
    first: ProjectionNeeds = ProjectionNeeds()
    second: ProjectionNeeds = ProjectionNeeds()


class BlockSaved(NamedTuple):
    """Saved for backward, beside x, the routing and the factors: u [P, P1] before the gate, S1 and
    S2 [P, R] of the rows sorted by expert."""

    rows: Tensor
    S1: Tensor | None
    S2: Tensor | None


class ProjectionGradients(NamedTuple):
    """Gradients in the dtypes of their factors: bias [E, N], A [E, R, K], B [E, N, R]."""

    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None


class _Sums:
    """The gradients of a projection's factors, filled in expert by expert."""

    def __init__(self, projection: Projection, needs: ProjectionNeeds) -> None:
        self._needs = needs
        self.bias = _zeros(projection.bias, needs.bias)
        self.A = _zeros(projection.A, needs.A)
        self.B = _zeros(projection.B, needs.B)

    def add(self, expert: int, bias: Tensor | None, A: Tensor | None, B: Tensor | None) -> None:
        for total, part in ((self.bias, bias), (self.A, A), (self.B, B)):
            if total is not None and part is not None:
                total[expert] = part

    def gradients(self) -> ProjectionGradients:
        return ProjectionGradients(self.bias, self.A, self.B)


def _zeros(factor: Tensor | None, needed: bool) -> Tensor | None:
    """Of the factor's shape, contiguous; an expert without rows has a gradient of zeros."""
    if factor is None or not needed:
        return None
    return torch.zeros(factor.shape, dtype=factor.dtype, device=factor.device)


def project_forward(
    x: Tensor, offsets: Tensor, projection: Projection, needs: ProjectionNeeds
) -> tuple[Tensor, Tensor | None]:
    """y [T, N] of x [T, K], sorted by expert, and S [T, R] if B trains."""
    y = x.new_zeros(x.shape[0], projection.weight.shape[1])
    S = _saved_S(projection, needs, x, x.shape[0])
    with without_autocast(x):
        factors = projection.by_expert(x.dtype)
        for expert, start, stop in spans(offsets, x.shape[0]):
            rows = slice(start, stop)
            y[rows], found = _forward(x[rows], factors[expert], S is not None)
            _keep(S, rows, found)
    return y, S


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
    """dX [T, K] and the factors' gradients, for dY [T, N]."""
    dX = dY.new_zeros(dY.shape[0], projection.weight.shape[2]) if needs_x else None
    sums = _Sums(projection, needs)
    wanted = (Needs(x=needs_x, bias=needs.bias, A=needs.A, B=needs.B),)
    with without_autocast(dY):
        factors = projection.by_expert(dY.dtype)
        for expert, start, stop in spans(offsets, dY.shape[0]):
            rows = slice(start, stop)
            saved = Saved(None if S is None else S[rows])
            x_e = None if x is None else x[rows]
            (found,) = TORCH.backward([dY[rows]], x_e, saved, [factors[expert]], wanted)
            if dX is not None:
                dX[rows] = given(found.x)
            sums.add(expert, found.bias, found.A, found.B)
    return dX, sums.gradients()


def block_forward(
    x: Tensor,
    w: Tensor,
    routing: Routing,
    first: Projection,
    second: Projection,
    gate: Gate,
    needs: BlockNeeds | None,
) -> tuple[Tensor, BlockSaved | None]:
    """out [T, H] for x [T, H] and routing weights w [T, k]; `needs` None: nothing is saved."""
    (tokens, _), places = x.shape, routing.order.shape[0]
    wide = wide_dtype(x.dtype)
    out = x.new_zeros(tokens, second.weight.shape[1], dtype=wide)
    of_rows = w.reshape(-1)[routing.order].to(wide).unsqueeze(1)
    saved = None
    if needs is not None:
        saved = BlockSaved(
            x.new_empty(places, first.weight.shape[1]),
            _saved_S(first, needs.first, x, places),
            _saved_S(second, needs.second, x, places),
        )
    with without_autocast(x):
        firsts, seconds = first.by_expert(x.dtype), second.by_expert(x.dtype)
        for expert, start, stop in routing.spans():
            rows, token = slice(start, stop), routing.token[start:stop]
            saves_1 = saved is not None and saved.S1 is not None
            saves_2 = saved is not None and saved.S2 is not None
            u, S1 = _forward(x.index_select(0, token), firsts[expert], saves_1)
            y, S2 = _forward(gate.forward(u), seconds[expert], saves_2)
            out.index_add_(0, token, of_rows[rows] * y)
            if saved is not None:
                saved.rows[rows] = u
                _keep(saved.S1, rows, S1)
                _keep(saved.S2, rows, S2)
    return out.to(x.dtype), saved


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
    """dx [T, H], dw [T, k] and the gradients of both projections; x is None unless A1 trains."""
    wide, hidden = wide_dtype(dout.dtype), first.weight.shape[2]
    dx = dout.new_zeros(dout.shape[0], hidden, dtype=wide) if needs.x else None
    dw = torch.zeros(w.numel(), dtype=wide, device=w.device) if needs.w else None
    of_rows = w.reshape(-1)[routing.order].to(wide).unsqueeze(1)
    sums = _Sums(first, needs.first), _Sums(second, needs.second)
    goes_on = needs.x or any(needs.first)
    wanted_1 = (Needs(needs.x, False, *needs.first),)
    wanted_2 = (Needs(x=goes_on or needs.w, A=needs.second.A, B=needs.second.B),)
    with without_autocast(dout):
        firsts, seconds = first.by_expert(dout.dtype), second.by_expert(dout.dtype)
        for expert, start, stop in routing.spans():
            rows, token = slice(start, stop), routing.token[start:stop]
            dy, scale, f = dout.index_select(0, token), of_rows[rows], seconds[expert]
            h, vjp = gate.rebuilt(saved.rows[rows])
            read = (h * scale).to(h.dtype) if needs.second.A else None
            S2 = None if saved.S2 is None else (saved.S2[rows] * scale).to(h.dtype)
            (found,) = TORCH.backward([dy], read, Saved(S2), [f], wanted_2)
            bias = (dy.to(wide) * scale).sum(0) if needs.second.bias else None
            sums[1].add(expert, bias, found.A, found.B)
            if dw is not None:
                dw[routing.order[rows]] = _weight_gradient(given(found.x), h, dy, f, wide)
            if not goes_on:
                continue
            du = vjp((given(found.x) * scale).to(h.dtype))
            x_e = None if x is None else x.index_select(0, token)
            S1 = None if saved.S1 is None else saved.S1[rows]
            (found,) = TORCH.backward([du], x_e, Saved(S1), [firsts[expert]], wanted_1)
            sums[0].add(expert, found.bias, found.A, found.B)
            if dx is not None:
                dx.index_add_(0, token, given(found.x).to(wide))
    return (
        None if dx is None else dx.to(dout.dtype),
        None if dw is None else dw.to(w.dtype).view(w.shape),
        sums[0].gradients(),
        sums[1].gradients(),
    )


def _weight_gradient(v: Tensor, h: Tensor, dy: Tensor, f: Factors, wide: torch.dtype) -> Tensor:
    """⟨v, h⟩ + ⟨bias, dy⟩ of every row: ⟨dy, y⟩ without y."""
    found = torch.linalg.vecdot(v.to(wide), h.to(wide))
    return found if f.bias is None else found.add_(dy.to(wide) @ f.bias.to(wide))


def _forward(rows: Tensor, f: Factors, saves_S: bool) -> tuple[Tensor, Tensor | None]:
    (y,), saved = TORCH.forward(rows, (f,), _SAVES_S if saves_S else _NOTHING)
    return y, saved.S


def _saved_S(projection: Projection, needs: ProjectionNeeds, x: Tensor, rows: int) -> Tensor | None:
    if projection.A is None or not needs.B:
        return None
    return x.new_empty(rows, projection.A.shape[1])


def _keep(total: Tensor | None, rows: slice, part: Tensor | None) -> None:
    if total is not None and part is not None:
        total[rows] = part
