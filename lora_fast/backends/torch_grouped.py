"""Experts in aten calls on a GPU: all of them in each call, and nothing waits for the offsets.

The equations, what is saved and the order of sums are those of :mod:`torch_experts`; the products
are those of ``grouped_mm``, which takes the offsets from the device. The rows of all experts are
gathered once, and an NF4 weight is decoded into one workspace for each pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..experts.nf4_experts import NF4Experts
from ..experts.operands import Projection, Routing
from . import torch_experts
from .torch_experts import BlockNeeds, BlockSaved, ProjectionGradients, ProjectionNeeds
from .torch_gates import Gate
from .torch_ops import without_autocast

project_forward = torch_experts.project_forward
project_backward = torch_experts.project_backward
# A row of an operand starts at a multiple of 16 bytes.
_ALIGNED = 8
_grouped: Any = getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def takes(x: Tensor, *projections: Projection) -> bool:
    """Whether grouped products compute these projections of x, and are what to compute with."""
    return x.is_cuda and fits(x, *projections)


def fits(x: Tensor, *projections: Projection) -> bool:
    """Whether torch has grouped products, in a dtype for which they are one launch, and every
    operand is aligned."""
    if _grouped is None or x.dtype is not torch.bfloat16:
        return False
    return not any(size % _ALIGNED for p in projections for size in p.weight.shape[1:])


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
    with without_autocast(x):
        u, S1 = _project(x.index_select(0, routing.token), routing, first)
        y, S2 = _project(gate.forward(u), routing, second)
        y = y * w.reshape(-1)[routing.order].unsqueeze(1)
        out = _per_token(y, routing, x.shape[0]).to(x.dtype)
    if needs is None:
        return out, None
    saved_1, saved_2 = needs.first.B, needs.second.B
    return out, BlockSaved(u, S1 if saved_1 else None, S2 if saved_2 else None)


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
    dx = dw = None
    of_first = ProjectionGradients()
    with without_autocast(dout):
        dy = dout.index_select(0, routing.token)
        scale = w.reshape(-1)[routing.order].float().unsqueeze(1)
        h, vjp = gate.rebuilt(saved.rows)
        v, dS2 = _backward(dy, routing, second)
        of_second = _gradients(
            dy, dS2, h * scale, None if saved.S2 is None else saved.S2 * scale,
            scale, routing, second, needs.second,
        )  # fmt: skip
        if needs.w:
            found = torch.linalg.vecdot(v.float(), h.float())
            if second.bias is not None:
                found += torch.linalg.vecdot(dy.float(), _bias_of_rows(second, routing).float())
            found = found if routing.complete else found.masked_fill(_outside(routing), 0.0)
            dw = torch.empty_like(found).scatter_(0, routing.order, found)
            dw = dw.to(w.dtype).view(w.shape)
        if needs.x or any(needs.first):
            du = vjp((v * scale).to(h.dtype))
            dX, dS1 = _backward(du, routing, first)
            rows = None if x is None else x.index_select(0, routing.token)
            one = du.new_ones(du.shape[0], 1)
            of_first = _gradients(du, dS1, rows, saved.S1, one, routing, first, needs.first)
            if needs.x:
                dx = _per_token(dX, routing, dout.shape[0]).to(dout.dtype)
    return dx, dw, of_first, of_second


def _project(rows: Tensor, routing: Routing, p: Projection) -> tuple[Tensor, Tensor | None]:
    """y [P, N] and S [P, R] of rows [P, K]."""
    S = None
    y = _product(rows, _dense(p, rows.dtype).transpose(1, 2), routing)
    if p.A is not None and p.B is not None:
        A, B = _aligned(p.A, 1, rows.dtype), _aligned(p.B, 2, rows.dtype)
        S = _product(rows, A.transpose(1, 2), routing)
        y.add_(_product(S, B.transpose(1, 2), routing), alpha=p.scaling)
        S = S[:, : p.A.shape[1]]
    if p.bias is not None:
        y.add_(_bias_of_rows(p, routing))
    return y, S


def _backward(dy: Tensor, routing: Routing, p: Projection) -> tuple[Tensor, Tensor | None]:
    """(W + s B A)ᵀ dy [P, K], and dS = s · dy B [P, R], padded."""
    v, dS = _product(dy, _dense(p, dy.dtype), routing), None
    if p.A is not None and p.B is not None:
        A, B = _aligned(p.A, 1, dy.dtype), _aligned(p.B, 2, dy.dtype)
        dS = _product(dy, B, routing).mul_(p.scaling)
        v.add_(_product(dS, A, routing))
    return v, dS


def _gradients(
    dy: Tensor,
    dS: Tensor | None,
    x: Tensor | None,
    S: Tensor | None,
    scale: Tensor,
    routing: Routing,
    p: Projection,
    needs: ProjectionNeeds,
) -> ProjectionGradients:
    """dA = dSᵀ x, dB = s · dyᵀ S and dbias = dyᵀ scale of every expert."""
    bias = A = B = None
    if needs.bias and p.bias is not None:
        column = functional.pad(scale.to(dy.dtype), (0, _ALIGNED - 1))
        bias = _product(dy.T, column, routing)[:, :, 0].to(p.bias.dtype)
    if needs.A and p.A is not None and dS is not None and x is not None:
        A = _product(dS.T, x.to(dy.dtype), routing)[:, : p.A.shape[1]].to(p.A.dtype)
    if needs.B and p.B is not None and S is not None:
        R = S.shape[1]
        padded = functional.pad(S.to(dy.dtype), (0, -R % _ALIGNED))
        B = _product(dy.T, padded, routing)[:, :, :R].mul(p.scaling).to(p.B.dtype)
    return ProjectionGradients(bias, A, B)


def _product(a: Tensor, b: Tensor, routing: Routing) -> Tensor:
    """a_e b_e of every expert: [P, N] of rows a [P, K] and b [E, K, N], or [E, N, K] of a [N, P]
    and rows b [P, K]. Rows beyond the last offset are not written."""
    return _grouped(a, b, offs=routing.offsets)


def _dense(p: Projection, dtype: torch.dtype) -> Tensor:
    weight = p.weight
    if not isinstance(weight, NF4Experts):
        return weight.to(dtype)
    if weight.decoded is None:
        return weight.dequantize(dtype)
    return weight.decoded.once(dtype, lambda: weight.dequantize(dtype))


def _aligned(factor: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """A [E, R, K] or B [E, N, R] in `dtype`, contiguous, its rank padded with zeros."""
    missing = -factor.shape[dim] % _ALIGNED
    padding = (0, missing) if dim == 2 else (0, 0, 0, missing)
    return functional.pad(factor.to(dtype), padding).contiguous()


def _bias_of_rows(p: Projection, routing: Routing) -> Tensor:
    assert p.bias is not None
    experts = torch.searchsorted(routing.offsets, _places(routing), right=True)
    return p.bias[experts.clamp_(max=p.bias.shape[0] - 1)]


def _places(routing: Routing) -> Tensor:
    return torch.arange(
        routing.order.shape[0], device=routing.order.device, dtype=routing.offsets.dtype
    )


def _outside(routing: Routing) -> Tensor:
    """Boolean [P], True where a row belongs to no expert."""
    return _places(routing) >= routing.offsets[-1]


def _per_token(rows: Tensor, routing: Routing, tokens: int) -> Tensor:
    """Σ over the rows of each token, in their places' order, not below float32."""
    if not routing.complete:
        rows = rows.masked_fill(_outside(routing).unsqueeze(1), 0.0)
    back = torch.empty_like(routing.order)
    back[routing.order] = torch.arange(back.shape[0], device=back.device)
    k = rows.shape[0] // max(1, tokens)
    return rows.index_select(0, back).view(tokens, k, rows.shape[1]).sum(1, dtype=torch.float32)
