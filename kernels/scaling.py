"""Powers of two that keep the operands of gradients within the range of float16.

float16 keeps full precision down to 2⁻¹⁴, and gradients are smaller. So dS stays float32 in memory,
beside it the largest |dS| of every column of a tile of rows, and every float16 operand of a
product, dS or the factor Q of dS = dY Q, is first multiplied by a power of two u, and the product
by 1 / u:

    2¹⁴ ≤ u · max |operand| < 2¹⁵          2⁻¹⁰⁰ ≤ u ≤ 2¹⁰⁰

It does not round, and a number 2²⁸ times smaller than the largest keeps all its digits. Only finite
numbers count, so a row that is not finite affects no other. bfloat16 and float32 have enough
exponent bits without it.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch_plans import empty

_TOP = tl.constexpr(14)
# u · x and x / u stay far from the ends of float32 for what is no gradient, such as dX.
_MOST = tl.constexpr(100)
_COLUMNS = tl.constexpr(128)


class Shrunk(NamedTuple):
    """S or dS [M, R]; `largest` [J, R] has for a dS that is to be scaled the largest number of each
    column in each tile of `tile_rows` rows."""

    values: Any
    largest: Any = None
    tile_rows: int = 1


def new_gradient(dY, R, tile_rows):
    """Memory for the dS [M, R] of dY [M, N], whose tiles are `tile_rows` high."""
    M = dY.shape[0]
    if dY.dtype != torch.float16:
        return Shrunk(empty(dY, M, R))
    tiles, float32 = -(-M // tile_rows), {"dtype": torch.float32}
    values, largest = (empty(dY, rows, R, **float32) for rows in (M, tiles))
    return Shrunk(values, largest, tile_rows)


@triton.jit
def largest_finite(tile, axis: tl.constexpr):
    """max |tile| over an axis, of its finite numbers."""
    magnitude = tl.abs(tile)
    return tl.max(tl.where(magnitude < float("inf"), magnitude, 0.0), axis)


@triton.jit
def power_of_two(largest):
    """u for operands that are `largest` at most, and 1 / u."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    down = tl.minimum(tl.maximum(exponent - _TOP, -_MOST), _MOST)
    u = ((127 - down) << 23).to(tl.float32, bitcast=True)
    return u, ((127 + down) << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_of(u):
    """1 / u."""
    return ((254 << 23) - u.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def scaled_columns(tile, DTYPE: tl.constexpr):
    """A float32 tile as an operand in DTYPE, its columns scaled, and their 1 / u [1, columns]."""
    u, inverse = power_of_two(largest_finite(tile, 0))
    return (tile * u[None, :]).to(DTYPE), inverse[None, :]


@triton.jit
def column_scales(largest_ptr, first_m, last_m, tile_rows, offs_r, R):
    """u and 1 / u of the columns of dS, the same for all rows [first_m, last_m)."""
    TILES: tl.constexpr = 16
    largest = tl.zeros([offs_r.shape[0]], tl.float32)
    last = tl.cdiv(last_m, tile_rows)
    for tile in range(first_m // tile_rows, last, TILES):
        offs_t = tile + tl.arange(0, TILES)
        ptrs = largest_ptr + offs_t.to(tl.int64)[:, None] * R + offs_r[None, :]
        inside = (offs_t < last)[:, None] & (offs_r < R)[None, :]
        largest = tl.maximum(largest, tl.max(tl.load(ptrs, mask=inside, other=0.0), 0))
    return power_of_two(largest)


@triton.jit
def tile_scale(largest_ptr, first_m, last_m, tile_rows, columns):
    """u and 1 / u of all of dS in the rows [first_m, last_m), for all its columns."""
    first = first_m // tile_rows
    count = (tl.cdiv(last_m, tile_rows) - first) * columns
    ptr = largest_ptr + tl.cast(first, tl.int64) * columns
    largest = tl.zeros([_COLUMNS], tl.float32)
    for i in range(0, count, _COLUMNS):
        offs = i + tl.arange(0, _COLUMNS)
        largest = tl.maximum(largest, tl.load(ptr + offs, mask=offs < count, other=0.0))
    return power_of_two(tl.max(largest, 0))
