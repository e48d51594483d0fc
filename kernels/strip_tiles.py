"""The walk of strips down a range of rows, and the layer that a block of columns falls to."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .dropout import drop, seed_of
from .scaling import column_scales, scaled_columns
from .tiles import load_factor, load_tile, load_vector, settled, store_tile


class StripTiles(NamedTuple):
    """A constant of a launch: rows, columns of X and columns of S in a tile; of what the rank and
    the rows of S, and the rows of B and its gradient, are multiples."""

    BLOCK_M: int
    BLOCK_L: int
    BLOCK_R: int
    UNIT: int
    FACTOR_UNIT: int


class Side(NamedTuple):
    """What a launch reads and writes of one layer: X [M, L], B [L, R] and their gradients, that of
    the bias or None. Of all layers side by side it has the columns of S from first_r on, the
    columns from first_l on, and the blocks of columns from first_block on."""

    x_ptr: Any
    B_ptr: Any
    factor_ptr: Any
    bias_ptr: Any
    scaling: float
    L: int
    stride_xm: int
    first_r: int
    first_l: int
    first_block: int


@triton.jit
def side_of(block, side, others, widths, M):
    """The layer that a block of columns falls to, of `side` and those after it; where they have no
    bias_ptr, that of `side` is any pointer. M >= 0."""
    # Zero, which the compiler does not know. Of a choice between two parameters it would make one
    # load from the chosen one's address, which constants are read from slowly.
    zero = tl.multiple_of(M >> 31, 16)
    # Not len(others): Triton 3.6 fails on the length of a tuple that holds None.
    for i in tl.static_range(len(widths)):
        is_later = block >= others[i].first_block
        bias_ptr = side.bias_ptr
        if others[i].bias_ptr is not None:
            bias_ptr = tl.where(is_later, others[i].bias_ptr + zero, bias_ptr)
        side = Side(
            tl.where(is_later, others[i].x_ptr + zero, side.x_ptr),
            tl.where(is_later, others[i].B_ptr + zero, side.B_ptr),
            tl.where(is_later, others[i].factor_ptr + zero, side.factor_ptr),
            bias_ptr,
            tl.where(is_later, others[i].scaling + zero, side.scaling),
            tl.where(is_later, widths[i] + zero, side.L),
            tl.where(is_later, others[i].stride_xm + zero, side.stride_xm),
            tl.where(is_later, others[i].first_r, side.first_r),
            tl.where(is_later, others[i].first_l, side.first_l),
            tl.where(is_later, others[i].first_block, side.first_block),
        )
    return side


@triton.jit
def _column_sums(x, v_mat, offs_m, offs_l, NEEDS_V: tl.constexpr):
    """Σ_m x and, for dg, Σ_m x ⊙ V, of one tile, in float32."""
    wide = x.to(tl.float32)
    sums = tl.sum(wide, axis=0)
    products = sums
    if NEEDS_V:
        V = load_tile(v_mat, offs_m, offs_l).to(tl.float32)
        products = tl.sum(wide * V, axis=0)
    return sums, products


@triton.jit
def walk_rows(
    x_mat, s_mat, v_mat, B_mat, dS_mat, largest_ptr, gains, scaling, words,
    first_m, first_l, first_r, tile_rows,
    NEEDS_T: tl.constexpr, SUMS: tl.constexpr, NEEDS_V: tl.constexpr, DROPOUT: tl.constexpr,
    TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """The rows of x_mat from first_m on: T [BLOCK_L, BLOCK_R], Σ x, Σ x ⊙ V; stores dS partials."""
    dtype = x_mat.ptr.dtype.element_ty
    IS_FLOAT16: tl.constexpr = dtype == tl.float16
    STORES_dS: tl.constexpr = dS_mat.ptr is not None
    BLOCK_L: tl.constexpr = TILES.BLOCK_L
    BLOCK_R: tl.constexpr = TILES.BLOCK_R
    last_m, R = x_mat.size_0, B_mat.size_1
    offs_l = first_l + tl.arange(0, BLOCK_L)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    T = tl.zeros([BLOCK_L, BLOCK_R], tl.float32)
    sums = tl.zeros([BLOCK_L], tl.float32)
    products = tl.zeros([BLOCK_L], tl.float32)
    if STORES_dS:
        factor = load_factor(B_mat, gains, 1.0, offs_l, offs_r, True, tl.float32)
        if gains.g is not None:
            factor *= load_vector(gains.g, offs_l, x_mat.size_1)[:, None]
        # Scaled by s after the product: s · B can be too small for float16, and so can B.
        product_scale = tl.cast(scaling, tl.float32)
        if IS_FLOAT16:
            factor, inverse = scaled_columns(factor, dtype)
            product_scale = product_scale * inverse
        else:
            factor = factor.to(dtype)
    if largest_ptr is not None:
        s_scale, s_inverse = column_scales(largest_ptr, first_m, last_m, tile_rows, offs_r, R)
    if DROPOUT:
        seed = seed_of(words)
    for m in range(first_m, last_m, TILES.BLOCK_M):
        offs_m = m + tl.arange(0, TILES.BLOCK_M)
        x = load_tile(x_mat, offs_m, offs_l)
        if DROPOUT:
            x = drop(x, words, seed, offs_m, first_l, BLOCK_L, TARGET.PAIRS)
        if NEEDS_T:
            S = load_tile(s_mat, offs_m, offs_r)
            if largest_ptr is not None:
                S = (S * s_scale[None, :]).to(dtype)
            T = tl.dot(tl.trans(x), S, T, input_precision=TARGET.PRECISION)
            if DROPOUT and TARGET.SETTLES:
                T = settled(T)
        # After T: the conversion of dS, generic writes to shared memory, would stand between the
        # fence and T's products, and ptxas would run these one by one.
        if STORES_dS:
            dS = tl.dot(x, factor, input_precision=TARGET.PRECISION) * product_scale
            store_tile(dS_mat, dS, offs_m, offs_r)
        if SUMS:
            tile_sums, tile_products = _column_sums(x, v_mat, offs_m, offs_l, NEEDS_V)
            sums += tile_sums
            products += tile_products
    if largest_ptr is not None:
        T *= s_inverse[None, :]
    if DROPOUT:
        T *= tl.cast(words.keep_scale, tl.float32)
    return T, sums, products
