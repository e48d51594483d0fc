"""The Triton backend: the factors of the equation, handed to the kernels.

Forward takes one launch per layer; in a group the first makes S for all. Backward takes one per
layer for the gradients from dY and S, one for dX and dS, one for dA. With many rows one more per
direction decodes an NF4 weight.

Plans (tuning/plans.py) are ways to do this; all of them save the same tensors. With the backend set
to ``triton`` the kernels compute; ``auto`` leaves the choice between them and cuBLAS to the tuner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..factors import Factors, Gradients, Needs, Saved, needs_of_all
from ..gated import Activation, GatedGradients, GatedLinears, GatedNeeds, GatedSaved
from ..geometry import Numbered
from ..kernels import dropout as dropout_kernels
from ..kernels import row_norms as row_norms_kernels
from ..kernels import ticketed_gemm, weight_update
from ..kernels.launch_plans import empty
from ..kernels.scaling import Shrunk
from ..kernels.tiles import Gains
from ..nf4 import NF4Weight
from ..tuning.plans import (
    BACKWARD,
    BACKWARD_GROUP,
    FORWARD,
    FORWARD_GROUP,
    FUSED,
    Plan,
    query,
)
from ..tuning.tuner import tuner
from . import torch_gated, triton_gated, triton_opaque, triton_routes
from .protocol import columns_of, ranks_of, shaped_as
from .torch_layer import without_autocast
from .torch_ops import TORCH
from .triton_gradients import grad_A, output_side, output_sides
from .triton_operands import (
    Launching,
    alike_A,
    dense,
    dropout,
    gemm_operand,
    shape_only,
    vectors,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The needs of a forward pass in a query.
_NOTHING, _SAVES_V = Needs(), Needs(g=True)


class TritonBackend:
    """:class:`lora_fast.backends.protocol.Backend` in kernels, or by cuBLAS where `cublas` allows
    it."""

    name = "triton"
    copies_input = False

    def __init__(self, *, cublas: bool) -> None:
        self._cublas = cublas

    def forward(
        self,
        x: Tensor,
        fs: Sequence[Factors],
        needs: Sequence[Needs],
        plan: Plan | None = None,
        numbered: Numbered | None = None,
    ) -> tuple[list[Tensor], Saved]:
        """As the protocol has it; by `plan`, where one is given. `numbered` is for launch plans."""
        _check_dtype(x)
        rows = x.reshape(-1, x.shape[-1])
        need = needs[0] if len(needs) == 1 else needs_of_all(needs)
        if plan is None:
            plan = FUSED
            if rows.shape[0]:
                op = FORWARD if len(fs) == 1 else FORWARD_GROUP
                asked = [_SAVES_V if need.saves_V else _NOTHING] * len(fs)
                plan = self._plan(op, rows, fs, asked, lambda p: self.forward(x, fs, needs, p))
        if plan.route != "fused":
            augments = plan.route == "augmented" and triton_routes.can_augment(fs)
            compute = triton_routes.augmented if augments else triton_routes.hybrid
            with Launching(rows), without_autocast(rows):
                ys, S, V = compute(rows, fs, need)
            return [shaped_as(x, y) for y in ys], Saved(S, V)
        made: Tensor | None = None
        shrinks: list[dict[str, Any]] = [{"A": fs[0].A}]
        if len(fs) > 1:
            made, shrinks = _shared_shrink(rows, fs)
        ys = []
        # Configurations go by the rank of the layer, also where the rows of its part of S start off
        # 16 bytes for the ranks of the others: that takes 4 registers more, 248 on sm_80, and
        # spills none.
        with Launching(rows):
            for f, shrink in zip(fs, shrinks, strict=True):
                bias, gains = vectors(f)
                y, S, V = ticketed_gemm.forward(
                    rows, gemm_operand(f.weight, rows, plan.workspace), B=f.B,
                    scaling=f.constants.scaling, bias=bias, gains=gains, dropout=dropout(f),
                    rank_spans=f.constants.rank_spans, saves_V=need.saves_V, config=plan.gemm,
                    **shrink,
                )  # fmt: skip
                ys.append(shaped_as(x, y))
        return ys, Saved((S if made is None else made) if need.saves_S else None, V)

    def backward(
        self,
        dYs: Sequence[Tensor],
        x: Tensor | None,
        saved: Saved,
        fs: Sequence[Factors],
        needs: Sequence[Needs],
        plan: Plan | None = None,
        number: int | None = None,
    ) -> list[Gradients]:
        """As the protocol has it; by `plan`, where one is given. `number`, of the geometry of
        forward, is for launch plans."""
        rows = [dY.reshape(-1, dY.shape[-1]) for dY in dYs]
        if rows[0].shape[0] == 0:
            return [_empty_batch(*each) for each in zip(dYs, fs, needs, strict=True)]
        if plan is None:
            op = BACKWARD if len(fs) == 1 else BACKWARD_GROUP
            arguments = (dYs, x, saved, fs, needs)
            plan = self._plan(op, rows[0], fs, needs, lambda p: self.backward(*arguments, p))
        x = None if x is None else x.reshape(-1, x.shape[-1])
        with Launching(rows[0]), without_autocast(rows[0]):
            grads = _gradients(rows, x, saved, fs, needs, plan)
        dX = grads[0].x
        if dX is not None:
            grads[0] = grads[0]._replace(x=dX.view(*dYs[0].shape[:-1], dX.shape[-1]))
        return grads

    def add_low_rank(
        self, y: Tensor | None, x: Tensor, f: Factors, needs: Needs, *, in_place: bool
    ) -> tuple[Tensor, Saved]:
        _check_dtype(x)
        rows = x.reshape(-1, x.shape[-1])
        with Launching(rows), without_autocast(rows):
            S = triton_opaque.shrunk(rows, f, cublas=self._cublas)
            sum_ = triton_opaque.expanded(
                S, f, rows.dtype, y, cublas=self._cublas, in_place=in_place
            )
        out = y if in_place and y is not None else shaped_as(x, sum_)
        return out, Saved(S if needs.saves_S else None)

    def low_rank_gradients(
        self, dY: Tensor, x: Tensor | None, saved: Saved, f: Factors, needs: Needs
    ) -> Gradients:
        return triton_opaque.gradients(dY, x, saved, f, needs)

    def gated_forward(
        self, x: Tensor | None, linears: GatedLinears, activation: Activation, needs: GatedNeeds
    ) -> tuple[Tensor, GatedSaved]:
        """In the kernels of a gated MLP; of few rows by its layers, one launch each."""
        if triton_gated.takes(x, linears):
            return triton_gated.gated_forward(x, linears, activation, needs)
        return torch_gated.gated_forward(self, x, linears, activation, needs)

    def gated_backward(
        self,
        dY: Tensor,
        x: Tensor | None,
        saved: GatedSaved,
        linears: GatedLinears,
        activation: Activation,
        needs: GatedNeeds,
        *,
        in_place: bool,
    ) -> GatedGradients:
        """As gated_forward, whose decision depends on the number of rows alone."""
        if triton_gated.takes(dY, linears):
            return triton_gated.gated_backward(
                dY, x, saved, linears, activation, needs, in_place=in_place
            )
        return torch_gated.gated_backward(self, dY, x, saved, linears, activation, needs)

    def dropout_mask(
        self, seed: int | Tensor, M: int, K: int, p: float, device: torch.device
    ) -> Tensor:
        return dropout_kernels.dropout_mask(M, K, dropout_kernels.Dropout(p, seed), device)

    def row_norms(self, weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """In one launch; one more decodes NF4."""
        with Launching(A):
            return row_norms_kernels.norms_of(dense(weight, weight.dtype), A, B, scaling)

    @torch.no_grad()
    def update_weight(
        self,
        W: Tensor,
        out: Tensor,
        *,
        A: Tensor | None = None,
        B: Tensor | None = None,
        b: Tensor | None = None,
        d: Tensor | None = None,
        g: Tensor | None = None,
        scaling: float = 1.0,
    ) -> None:
        """In one launch; in float64 the torch backend's."""
        if W.dtype == torch.float64:
            TORCH.update_weight(W, out, A=A, B=B, b=b, d=d, g=g, scaling=scaling)
            return
        _check_dtype(W)
        gains = Gains(*(None if v is None else v.contiguous() for v in (b, d, g)))
        with Launching(W):
            weight_update.update(W, out, A, B, gains, scaling)
        # Autograd must notice that a kernel has overwritten a saved tensor.
        torch.autograd.graph.increment_version(out)

    def _plan(
        self,
        op: str,
        rows: Tensor,
        fs: Sequence[Factors],
        needs: Sequence[Needs],
        run: Callable[[Plan], Any],
    ) -> Plan:
        return tuner.plan(query(op, rows, fs, needs, cublas=self._cublas), rows.device, run)


def _shared_shrink(x: Tensor, fs: Sequence[Factors]) -> tuple[Tensor, list[dict[str, Any]]]:
    """Memory for the S [M, Σ R_i] of a group, and what its launches are told about theirs: the
    first makes S for all."""
    made = empty(x, x.shape[0], sum(ranks_of(fs)))
    shrinks: list[dict[str, Any]] = [{"S": S} for S in columns_of(made, fs)]
    A, *others = alike_A(fs)
    shrinks[0] = {"A": A, "others": others, "made": made}
    return made, shrinks


def _gradients(
    dYs: Sequence[Tensor],
    x: Tensor | None,
    saved: Saved,
    fs: Sequence[Factors],
    needs: Sequence[Needs],
    plan: Plan,
) -> list[Gradients]:
    """The gradients of every layer for dY [M, N_i] and x [M, K]."""
    f, need = fs[0], needs_of_all(needs)
    needs_dS = f.A is not None and (need.x or need.A)
    bias, gains = vectors(f)
    if len(fs) > 1:
        sides = output_sides(dYs, saved.S, fs, needs, needs_dS)
    else:
        sides = [output_side(dYs[0], saved.S, saved.V, f, bias, gains, need, needs_dS)]
    grads, layers = [grad for grad, _ in sides], []
    for dY, (_, partials), f_i in zip(dYs, sides, fs, strict=True):
        weight = shape_only(f_i.weight, dY)
        if need.x and plan.route == "fused":
            weight = gemm_operand(f_i.weight, dY, plan.workspace)
        layers.append(
            ticketed_gemm.Layer(dY, weight, f_i.A, f_i.B, f_i.constants.scaling, partials)
        )
    fused_dX = need.x and plan.route == "fused"
    dX, dS = None, Shrunk(None)
    if needs_dS or fused_dX:
        dX, dS = ticketed_gemm.grad_input(
            layers, dropout(f), gains=gains, rank_spans=f.constants.rank_spans,
            wants_dX=fused_dX, config=plan.gemm,
        )  # fmt: skip
    if need.x:
        dX = dX if fused_dX else triton_routes.input_gradient(dYs, dS, fs)
        grads[0] = grads[0]._replace(x=dX)
    if need.A and x is not None:
        grads = [
            grad._replace(A=dA) if need_i.A else grad
            for grad, dA, need_i in zip(grads, grad_A(x, dS, fs), needs, strict=True)
        ]
    if need.weight and x is not None:
        grads[0] = grads[0]._replace(weight=_weight_gradient(dYs[0], x, f))
    return grads


def _empty_batch(dY: Tensor, f: Factors, needs: Needs) -> Gradients:
    K = f.weight.shape[1]
    zeros = {
        name: torch.zeros_like(getattr(f, name))
        for name in Needs._fields[1:]
        if getattr(needs, name)
    }
    return Gradients(x=dY.new_empty((*dY.shape[:-1], K)) if needs.x else None, **zeros)


def _weight_gradient(dY: Tensor, x: Tensor, f: Factors) -> Tensor:
    """dW = dVᵀ x, a plain product of two large matrices, by cuBLAS."""
    dV = dY if f.g is None else (dY * f.g).to(dY.dtype)
    return (dV.T @ x).to(f.weight.dtype)


def _check_dtype(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise NotImplementedError(
            f"x must be float32, bfloat16 or float16 for the triton backend, got {x.dtype}; "
            "set_backend('torch') computes in float64"
        )
