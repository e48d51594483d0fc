"""The factors of the equation as the kernels take them, and the device that launches are on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..factors import Factors
from ..kernels import dropout as dropout_kernels
from ..kernels import environment, launch_policy, nf4_decode, nf4_tile, workspace
from ..kernels.launch_plans import called
from ..kernels.tiles import NO_GAINS, Gains
from ..nf4 import NF4Weight


class Launching:
    """Launch on x's device, which need not be the current one; clears tickets after a failure."""

    def __init__(self, x: Tensor) -> None:
        index = x.get_device()
        elsewhere = index >= 0 and x.is_cuda and index != torch.cuda.current_device()
        self._device = torch.cuda.device(index) if elsewhere else None

    def __enter__(self) -> None:
        if self._device is not None:
            self._device.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *exc: Any) -> None:
        if kind is not None:
            workspace.forget()
        if self._device is not None:
            self._device.__exit__(kind, *exc)


def factors_A(fs: Sequence[Factors]) -> list[Tensor]:
    return [f.A for f in fs if f.A is not None]


def alike_A(fs: Sequence[Factors]) -> list[Tensor]:
    """The A of all layers as one launch reads them: of one dtype and with equal strides, as they
    are unless layers differ."""
    factors = factors_A(fs)
    first = factors[0]
    if all((A.dtype, A.stride()) == (first.dtype, first.stride()) for A in factors[1:]):
        return factors
    dtype = functools.reduce(torch.promote_types, [A.dtype for A in factors])
    return [called(_row_by_row, A, dtype=dtype) for A in factors]


def _row_by_row(A: Tensor, dtype: torch.dtype) -> Tensor:
    """A [R, K] with strides (K, 1): PyTorch takes a matrix of one row for contiguous whatever its
    strides are, and a cast keeps those that there are."""
    if A.dtype is dtype and A.stride() == (A.shape[1], 1):
        return A
    return torch.empty(A.shape, dtype=dtype, device=A.device).copy_(A)


def vectors(f: Factors) -> tuple[Tensor | None, Gains]:
    """The bias and the gains, contiguous, as the kernels read them."""
    if f.bias is None and f.b is None and f.d is None and f.g is None:
        return None, NO_GAINS
    bias, b, d, g = f.bias, f.b, f.d, f.g
    bias = None if bias is None else bias.contiguous()
    if b is None and d is None and g is None:
        return bias, NO_GAINS
    return bias, Gains(*(None if v is None else v.contiguous() for v in (b, d, g)))


def dropout(f: Factors) -> Any:
    """The dropout of x as the kernels take it."""
    if f.constants.dropout_p == 0.0 or f.A is None:
        return dropout_kernels.NO_DROPOUT
    return dropout_kernels.Dropout(f.constants.dropout_p, f.constants.dropout_seed)


def dense(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`; NF4 decoded in one launch."""
    if isinstance(weight, NF4Weight):
        packed = weight.packed, weight.quant_state, dtype
        if weight.decoded is None:
            return nf4_decode.decode(*packed)
        return weight.decoded.once(dtype, lambda: nf4_decode.decode(*packed))
    return weight if weight.dtype == dtype else weight.to(dtype)


def gemm_operand(
    weight: Tensor | NF4Weight, x: Tensor, workspace: bool | None = None
) -> Tensor | nf4_tile.Nf4Operand:
    """The weight in the dtype of x [M, …], or packed if the GEMM of M rows decodes it, which
    launch_policy.py decides unless the caller does."""
    if not isinstance(weight, NF4Weight):
        return weight if weight.dtype == x.dtype else weight.to(x.dtype)
    if workspace is None:
        arch = environment.current_arch()
        reason = launch_policy.why_nf4_workspace(x.shape[0], weight.shape[1], x.dtype, arch)
        workspace = reason is not None
    if workspace or (weight.decoded is not None and weight.decoded.dense is not None):
        return dense(weight, x.dtype)
    return nf4_tile.Nf4Operand(weight.packed, weight.quant_state)


def shape_only(weight: Tensor | NF4Weight, like: Tensor) -> Tensor:
    """A placeholder for a weight that no tile reads, when only dS is required: any memory."""
    return like.as_strided(weight.shape, (0, 0))
