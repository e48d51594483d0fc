"""Matrix products of the torch backend: dtypes, operands, and sums in float32.

    product         a b        rows_product    aᵀ b over many rows        not below float32
    scaled_product  s · (a b)                                             rounded once

A CPU without instructions for a 16-bit dtype multiplies it as float32: the same products, many
times faster, and the factors need no rounding. If float16 operands are multiplied directly, those
on the way to a gradient are first scaled by powers of two: float16 keeps full precision only down
to 2⁻¹⁴, and gradients are smaller.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Rows of a narrow bfloat16 product on a CPU that are summed before each rounding: torch has no such
# product with a float32 result. Below the second number of rows, float32 is faster.
_CHUNK, _FEW = 512, 128
# The scale of a column of zeros, whose maximum has no logarithm.
_SMALLEST = 2.0**-100
_EXPONENT = 0x7F800000
_WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums of numbers of `dtype`: float32 or wider."""
    return _WIDE.get(dtype, dtype)


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the operands of products with x: its own, or float32 in its place."""
    if x.device.type != "cpu" or x.dtype not in _WIDE or x.dtype in native_dtypes():
        return x.dtype
    return torch.float32


@functools.cache
def native_dtypes() -> tuple[torch.dtype, ...]:
    """The 16-bit dtypes that this CPU multiplies."""
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return (torch.bfloat16,) if has_bfloat16 else ()


def scaled_product(a: Tensor, b: Tensor, scaling: float, out: Tensor | None = None) -> Tensor:
    """s · (a b), rounded once."""
    # With beta = 0 the first argument is not read.
    return torch.addmm(a.new_empty(1), a, b, beta=0.0, alpha=scaling, out=out)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, not rounded below float32."""
    if a.dtype not in _WIDE:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def rows_product(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b [P, Q] for a [M, P] and b [M, Q], the sums over M not rounded below float32.

    On a CPU that multiplies bfloat16 neither is converted: the sum of every few hundred rows is
    rounded once.
    """
    M = a.shape[0]
    if a.dtype != torch.bfloat16 or a.is_cuda or M <= _FEW:
        return product(a.T, b)
    total = (a[:_CHUNK].T @ b[:_CHUNK]).float()
    for start in range(_CHUNK, M, _CHUNK):
        rows = slice(start, start + _CHUNK)
        total += a[rows].T @ b[rows]
    return total


def operand(matrix: Tensor, dtype: torch.dtype, dim: int) -> tuple[Tensor, Tensor | None]:
    """`matrix` [M, R] as an operand in `dtype`, and the powers of two c by which it was divided:
    matrix = operand · c, c [1, R] for dim 0 and [M, 1] for dim 1.

    Each column (row) of a wider matrix has a c by which its largest element, divided, lies between
    1 and 2 in float16. Other dtypes have float32's exponents, and c is None.
    """
    if dtype != torch.float16 or matrix.dtype == dtype or matrix.numel() == 0:
        return matrix.to(dtype), None
    largest = torch.linalg.vector_norm(matrix, float("inf"), dim=dim, keepdim=True)
    # The exponent alone: 2 to the power of ⌊log₂ largest⌋, infinity for what is not finite.
    c = (largest.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=_SMALLEST)
    return (matrix / c).to(dtype), c
