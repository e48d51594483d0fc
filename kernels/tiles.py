"""Code that the kernels share: matrices and their tiles, gains, how the device computes.

Tiles are named by their index letters, m for rows (tokens), l for a long dimension (K or N), r for
the rank. Offsets into tensors are int64.

Arguments that travel together are NamedTuples: constants of a launch, pointers, or what the kernel
itself puts together. Numbers that vary are not launched in one: Triton compiles anew for every 1
and every multiple of 16 within a tuple, which a seed must not be.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import triton_version  # noqa: F401


class Matrix(NamedTuple):
    """A strided matrix [size_0, size_1] in memory."""

    ptr: Any
    stride_0: Any
    stride_1: Any
    size_0: Any
    size_1: Any


class Gains(NamedTuple):
    """The vectors b [N], d [R] and g [N] of a layer, or None."""

    b: Any = None
    d: Any = None
    g: Any = None


NO_GAINS = Gains()


class Target(NamedTuple):
    """A constant of a launch, how its device computes: the precision of products, dropout on pairs
    of elements, products that end with their iteration (`settled`), warp shuffles and PTX, and
    products by mma.sync."""

    PRECISION: str
    PAIRS: bool = False
    SETTLES: bool = False
    SHUFFLES: bool = False
    MMA_SYNC: bool = False


def unit_of(*numbers):
    """The largest power of two up to 8 of which all numbers are multiples; 1 if they are of 16,
    which the compiler sees by itself."""
    unit = math.gcd(16, *numbers)
    return 1 if unit == 16 else unit


def factor_unit(*factors):
    """unit_of where the rows of factors [L, R] or [E, L, R] start; 1 if the elements of a row are
    no neighbours, as in Aᵀ."""
    strides = [factor.stride() for factor in factors]
    if any(stride[-1] != 1 for stride in strides):
        return 1
    return unit_of(*[n for stride in strides for n in stride[:-1]])


@triton.jit
def in_units(number, UNIT: tl.constexpr):
    """A number as one that the compiler sees to be a multiple of UNIT, as it is.

    Of an argument it sees multiples of 16 alone: of other ranks it would load and store the rows of
    S and B by the element, with an address for each.
    """
    if UNIT > 1:
        number = number // UNIT * UNIT
    return number


@triton.jit
def tile_pointers(ptr, offs_0, offs_1, stride_0, stride_1):
    """Pointers to the tile [offs_0, offs_1] of a strided matrix."""
    rows = offs_0.to(tl.int64)[:, None] * stride_0
    return ptr + rows + offs_1.to(tl.int64)[None, :] * stride_1


@triton.jit
def settled(acc):
    """acc, to which no product is adding any more: an instruction that does nothing waits for it.

    Where the operand of a wgmma is made in registers, as dropout makes it, Triton 3.7 leaves the
    last one of an iteration running into the next, and ptxas then runs all of them one by one.
    """
    return tl.inline_asm_elementwise("", "=f,0", [acc], tl.float32, True, 1)


@triton.jit
def load_tile(matrix, offs_0, offs_1):
    """The tile [offs_0, offs_1] of a Matrix, zero outside of it."""
    mask = (offs_0 < matrix.size_0)[:, None] & (offs_1 < matrix.size_1)[None, :]
    ptrs = tile_pointers(matrix.ptr, offs_0, offs_1, matrix.stride_0, matrix.stride_1)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_tile(matrix, tile, offs_0, offs_1):
    """Store what lies within a Matrix of a tile [offs_0, offs_1], rounded to its dtype."""
    mask = (offs_0 < matrix.size_0)[:, None] & (offs_1 < matrix.size_1)[None, :]
    ptrs = tile_pointers(matrix.ptr, offs_0, offs_1, matrix.stride_0, matrix.stride_1)
    tl.store(ptrs, tile.to(matrix.ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(ptr, offs, size):
    """Elements of a vector in float32, zero from `size` on."""
    return tl.load(ptr + offs, mask=offs < size, other=0.0).to(tl.float32)


@triton.jit
def load_factor(factor, gains, scaling, offs_l, offs_r, IS_B: tl.constexpr, DTYPE: tl.constexpr):
    """A as [K, R], or s · b dᵀ ⊙ B as [N, R], multiplied in float32 and rounded once."""
    tile = load_tile(factor, offs_l, offs_r)
    if IS_B:
        tile = tile.to(tl.float32) * tl.cast(scaling, tl.float32)
        if gains.b is not None:
            tile *= load_vector(gains.b, offs_l, factor.size_0)[:, None]
        if gains.d is not None:
            tile *= load_vector(gains.d, offs_r, factor.size_1)[None, :]
    return tile.to(DTYPE)


@triton.jit
def sum_partials(
    partials_ptr, num_partials, offs_m, offs_r, M, R, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Σ_j partials[j, m, r], always in the order of j."""
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for j in range(0, num_partials):
        part = Matrix(partials_ptr + tl.cast(j, tl.int64) * M * R, R, 1, M, R)
        acc += load_tile(part, offs_m, offs_r)
    return acc
