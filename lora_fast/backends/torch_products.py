"""Matrix products of the torch backend: dtypes, operands, and sums in float32.

    product         a b        rows_product    s · (aᵀ b) over many rows  not below float32
    scaled_product  s · (a b)  linear          a bᵀ + bias                rounded once
    add_product     total + a b                                           rounded once

A CPU without instructions for a 16-bit dtype multiplies it as float32: the same products, many
times faster, and the factors need no rounding. If float16 operands are multiplied directly, those
on the way to a gradient are first scaled by powers of two: float16 keeps full precision only down
to 2⁻¹⁴, and gradients are smaller.

Two libraries multiply float32 on a CPU. PyTorch asks MKL, which on a CPU by AMD uses half of its
vector units: there oneDNN takes the larger products, in the same precision, twice as fast.
"""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

# Rows of a narrow bfloat16 product on a CPU that are summed before each rounding: torch has no such
# product with a float32 result.
_CHUNK = 512
# Up to so many rows, the low-rank products of 16 bits are computed in float32: a bfloat16 product
# of any size takes oneDNN's start, which is longer.
_FEW = 16
# Multiplications below which oneDNN's start outweighs its speed in float32.
_ONEDNN_FROM = 1 << 21
# Rows below which y has the bits of nn.Linear: few rows are compared with the base model.
_ONEDNN_ROWS = 32
# The scale of a column of zeros, whose maximum has no logarithm.
_SMALLEST = 2.0**-100
_EXPONENT = 0x7F800000
_WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums of numbers of `dtype`: float32 or wider."""
    return _WIDE.get(dtype, dtype)


def product_dtypes(x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the operands of products with x [..., K], and of the low-rank ones: its own, or
    float32 in its place."""
    dtype = x.dtype
    if x.device.type != "cpu" or dtype not in _WIDE:
        return dtype, dtype
    if dtype not in native_dtypes():
        return torch.float32, torch.float32
    return dtype, torch.float32 if x.numel() <= _FEW * x.shape[-1] else dtype


def working_dtype(x: Tensor) -> torch.dtype:
    """The first of them alone."""
    return product_dtypes(x)[0]


@functools.cache
def native_dtypes() -> tuple[torch.dtype, ...]:
    """The 16-bit dtypes that this CPU multiplies."""
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return (torch.bfloat16,) if has_bfloat16 else ()


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 faster than what PyTorch asks: on CPUs by AMD with AVX-512,
    of which MKL uses the AVX2 half."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _vendor() == "AuthenticAMD"
    )


def _vendor() -> str:
    """The CPU's maker, as its CPUID instruction spells it; "" if nobody tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == "vendor_id":
                    return value.strip()
    except OSError:
        return platform.processor().rpartition(" ")[2]  # Windows: "…, AuthenticAMD"
    return ""


def linear(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a bᵀ + bias [M, N] for a [M, K] and b [N, K]."""
    M = a.shape[0]
    if M >= _ONEDNN_ROWS and M * b.numel() >= _ONEDNN_FROM and _takes_onednn(a, b):
        return _onednn_linear(a, b, bias)
    return torch.nn.functional.linear(a, b, bias)


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b [M, N] for a [M, K] and b [K, N], in the memory of `total` if it is given."""
    if a.shape[0] * b.numel() >= _ONEDNN_FROM and _takes_onednn(a, b):
        ab = _onednn_linear(a, b.T)
        return ab if total is None else total.add_(ab)
    return a @ b if total is None else total.addmm_(a, b)


def _onednn_linear(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()  # of which oneDNN reads one element after the other
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def _takes_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN multiplies a [M, K] with b, [N, K] or [K, N], faster if both are large.

    If gaps are between the rows of b, its reference code does, a thousand times slower."""
    return (
        a.dtype is torch.float32
        and onednn_is_faster()
        and a.device.type == "cpu"
        and _is_packed(a)
        and _has_no_gaps(b)
        and torch._C._get_mkldnn_enabled()
    )


def _is_packed(matrix: Tensor) -> bool:
    """Whether the rows or the columns of a matrix lie apart, and their elements side by side."""
    (rows, columns), (over_rows, over_columns) = matrix.shape, matrix.stride()
    if over_columns == 1:
        return over_rows >= columns
    return over_rows == 1 and over_columns >= rows


def _has_no_gaps(matrix: Tensor) -> bool:
    """Whether the elements of a matrix or of its transpose lie side by side."""
    (rows, columns), strides = matrix.shape, matrix.stride()
    return strides in ((columns, 1), (1, rows))


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


def rows_product(
    a: Tensor,
    b: Tensor,
    scaling: float = 1.0,
    *,
    dtype: torch.dtype | None = None,
    cancels: bool = False,
) -> Tensor:
    """s · (aᵀ b) [P, Q] for a [M, P] and b [M, Q], the sums over M not rounded below float32, the
    result once, to `dtype` (None: not below float32).

    On a CPU that multiplies bfloat16 neither is converted: the sum of every few hundred rows is
    rounded once; no sum, if there is but one and what the caller adds up `cancels`.
    """
    (M, P), Q = a.shape, b.shape[1]
    few = (_CHUNK if cancels else _FEW) >= M
    is_scaled = scaling == 1.0
    if a.dtype is torch.float32:
        if M * P * Q >= _ONEDNN_FROM and _takes_onednn(b.T, a.T):
            # It is slow where the result has more rows than columns.
            ab = _onednn_linear(b.T, a.T).T.contiguous() if Q < P else _onednn_linear(a.T, b.T)
        else:
            ab = a.T @ b
    elif few or a.dtype is not torch.bfloat16 or a.is_cuda:
        ab = product(a.T, b)
    elif M <= _CHUNK:
        ab = a.T @ b if is_scaled else scaled_product(a.T, b, scaling)
        is_scaled = True
        if dtype is not torch.bfloat16:
            ab = ab.float()
    else:
        whole = M - M % _CHUNK
        chunks = [m[:whole].view(-1, _CHUNK, m.shape[1]) for m in (a, b)]
        ab = torch.bmm(chunks[0].transpose(1, 2), chunks[1]).sum(0, dtype=torch.float32)
        ab = ab if whole == M else ab.add_(a[whole:].T @ b[whole:])
    ab = ab if is_scaled else ab.mul_(scaling)
    return ab if dtype is None or ab.dtype is dtype else ab.to(dtype)


def operand(matrix: Tensor, dtype: torch.dtype, dim: int) -> tuple[Tensor, Tensor | None]:
    """`matrix` [M, R] as an operand in `dtype`, and the powers of two c by which it was divided:
    matrix = operand · c, c [1, R] for dim 0 and [M, 1] for dim 1.

    Each column (row) of a wider matrix has a c by which its largest element, divided, lies between
    1 and 2 in float16. Other dtypes have float32's exponents, and c is None.
    """
    if dtype != torch.float16 or matrix.dtype == dtype or matrix.numel() == 0:
        return matrix if matrix.dtype is dtype else matrix.to(dtype), None
    largest = torch.linalg.vector_norm(matrix, float("inf"), dim=dim, keepdim=True)
    # The exponent alone: 2 to the power of ⌊log₂ largest⌋, infinity for what is not finite.
    c = (largest.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=_SMALLEST)
    return (matrix / c).to(dtype), c
