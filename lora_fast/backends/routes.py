"""The operations on a Triton device, each by the route that the tuner picks for it.

Two routes lead to the same results: the fused kernels (triton_ops) and products by cuBLAS
(composed_ops). With the backend set to ``triton`` there is the first alone; ``auto`` takes either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..factors import Factors, Gradients, Needs, Saved
from ..tuning.plans import BACKWARD, BACKWARD_GROUP, FORWARD, FORWARD_GROUP, FUSED, Plan, query
from ..tuning.tuner import tuner
from . import composed_ops, triton_ops

# What a query holds of the needs of a forward pass.
_NOTHING, _KEEPS_V = Needs(), Needs(g=True)


class Routes:
    """The operations of a backend, by the fused kernels or, where `cublas` allows it, by cuBLAS."""

    dropout_mask = staticmethod(triton_ops.dropout_mask)
    row_norms = staticmethod(triton_ops.row_norms)
    update_weight = staticmethod(triton_ops.update_weight)

    def __init__(self, *, cublas: bool) -> None:
        self._cublas = cublas

    def forward(self, x: Tensor, f: Factors, needs: Needs) -> tuple[Tensor, Saved]:
        """y [M, N] and, where the backward pass needs them, S and V; x is [M, K]."""
        needs_V = [_KEEPS_V if needs.saves_V else _NOTHING]
        return self._routed(FORWARD, x, [f], needs_V, x, f, needs)

    def backward(
        self, dY: Tensor, x: Tensor | None, saved: Saved, f: Factors, needs: Needs
    ) -> Gradients:
        """Every wanted gradient for dY [M, N]; x [M, K] and `saved` as forward left them."""
        return self._routed(BACKWARD, dY, [f], [needs], dY, x, saved, f, needs)

    def forward_group(self, x: Tensor, fs: Sequence[Factors]) -> tuple[list[Tensor], Tensor, None]:
        """y [M, N_i] of layers that read the same x, and their S [M, Σ R_i] side by side."""
        return self._routed(FORWARD_GROUP, x, fs, [_NOTHING] * len(fs), x, fs)

    def backward_group(
        self,
        dYs: Sequence[Tensor],
        x: Tensor | None,
        S: Tensor,
        mask: None,
        fs: Sequence[Factors],
        needs: list[Needs],
    ) -> list[Gradients]:
        """The gradients of every layer of a group; that of x, their sum, is with the first."""
        return self._routed(BACKWARD_GROUP, dYs[0], fs, needs, dYs, x, S, mask, fs, needs)

    def _routed(
        self,
        op: str,
        rows: Tensor,
        fs: Sequence[Factors],
        needs: Sequence[Needs],
        *arguments: Any,
    ) -> Any:
        """The operation `op`, which both routes have under this name, of `arguments`."""

        def run(plan: Plan) -> Any:
            if plan.composed:
                return getattr(composed_ops, op)(*arguments)
            return getattr(triton_ops, op)(*arguments, plan)

        return run(_plan(op, rows, fs, needs, run, cublas=self._cublas))


def _plan(
    op: str,
    rows: Tensor,
    fs: Sequence[Factors],
    needs: Sequence[Needs],
    run: Callable[[Plan], Any],
    *,
    cublas: bool,
) -> Plan:
    if rows.shape[0] == 0 or not (cublas or tuner.times):
        return FUSED
    return tuner.plan(query(op, rows, fs, needs, cublas=cublas), rows.device, run)
