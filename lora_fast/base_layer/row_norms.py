"""The norms that DoRA divides by."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nf4 import NF4Weight
from ..operation import compiled_ops, dispatch


@torch.no_grad()
def row_norms(weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float | Tensor) -> Tensor:
    """‖W_i + s (B A)_i‖₂ of every row i: float32 [N].

    W [N, K] is a tensor or an NF4Weight, A [R, K], B [N, R]. The result is detached: in the
    backward pass the norm is a constant (DoRA, Liu et al. 2024, §4.3).

    Nothing is kept from one call to the next. Optimizers that write through raw pointers, ``.data``
    and collectives change W, A or B without a trace, and to look for a change takes the read of W
    that the norms take.
    """
    if not torch.compiler.is_compiling():
        return dispatch.row_norms(weight, A.detach(), B.detach(), float(scaling))
    if isinstance(scaling, Tensor):
        # Its value would have to be waited for.
        B, scaling = B * scaling, 1.0
    return compiled_ops.row_norms(weight, A.detach(), B.detach(), float(scaling))
