"""The norms that DoRA divides by."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.selection import backend_for
from ..nf4 import NF4Weight
from ..operation import compiled_ops
from ..operation.selective import as_one


@torch.no_grad()
def row_norms(weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float | Tensor) -> Tensor:
    """‖W_i + s (B A)_i‖₂ of every row i: float32 [N].

    W [N, K] is a tensor or an NF4Weight, A [R, K], B [N, R]. The result is detached: in the
    backward pass the norm is a constant (DoRA, Liu et al. 2024, §4.3).

    Nothing is cached between calls. Optimizers that write through raw pointers, ``.data`` and
    collectives change W, A or B without a trace, and detecting a change would take the same read of
    W as the norms.
    """
    if not torch.compiler.is_compiling():
        return _by_backend(weight, A.detach(), B.detach(), float(scaling))
    if isinstance(scaling, Tensor):
        # Reading its value would wait for the device.
        B, scaling = B * scaling, 1.0
    return compiled_ops.row_norms(weight, A.detach(), B.detach(), float(scaling))


@as_one
def _by_backend(weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return backend_for(weight.device).row_norms(weight, A, B, scaling)
