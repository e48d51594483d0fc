"""The norms that DoRA divides by, and when they must be computed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch, library_ops
from .nf4 import NF4Weight


class RowNorms:
    """‖W_i + s (B A)_i‖₂ of every row i, computed again when W, A, B or s have changed.

    A call returns float32 [N], detached: in the backward pass the norm is a constant (DoRA, Liu et
    al. 2024, §4.3). W [N, K] is a tensor or an NF4Weight, A [R, K], B [N, R].

    A and B are compared with copies of themselves: optimizers that write through raw pointers, and
    hot-swapping through ``.data``, leave no other trace. W, which is frozen, is known by its
    memory and version; ‖W_i‖² is computed once for it.
    """

    def __init__(self) -> None:
        self._weight: tuple[Any, ...] | None = None
        self._state: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle starts afresh: its tensors are elsewhere."""
        return RowNorms, ()

    @torch.no_grad()
    def __call__(
        self, weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float | Tensor
    ) -> Tensor:
        if torch.compiler.is_compiling():
            return row_norms_in_graph(weight, A, B, scaling)
        weight_now = _identity(weight)
        if weight_now != self._weight:
            self._weight, self._state = weight_now, None
        norms, self._state = dispatch.row_norms(
            weight, A.detach(), B.detach(), float(scaling), self._state
        )
        return norms


@torch.no_grad()
def row_norms_in_graph(
    weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float | Tensor
) -> Tensor:
    """What :class:`RowNorms` gives, for torch.compile, in whose graphs nothing is remembered."""
    if isinstance(scaling, Tensor):
        # Its value would have to be waited for.
        B, scaling = B * scaling, 1.0
    return library_ops.row_norms(weight, A.detach(), B.detach(), float(scaling))


def _identity(weight: Tensor | NF4Weight) -> tuple[Any, ...]:
    data = weight.packed if isinstance(weight, NF4Weight) else weight
    version = 0 if data.is_inference() else data._version
    return (data.data_ptr(), version, data.dtype, data.device, tuple(data.shape), data.stride())
