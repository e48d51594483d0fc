"""The powers of two u by which gated_backward multiplies operands in float16 (scaling.py).

    dh = base + (u dS) A / u        dA = (u dS)ᵀ h / u        dSg = dgate (u Qg) / u

That of dh is one number for all of dS in the rows of a CTA's walk. Products that keep the columns
of the rank have one for each: of dS in all these rows, and of Q in all columns of the CTA. So a sum
over rows or over tiles of columns has one scale, which it leaves when it is stored.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .gated_tiles import load_Q, load_scaled_B
from .scaling import column_scales, inverse_of, largest_finite, power_of_two, tile_scale
from .tiles import Matrix, load_tile


class Scales(NamedTuple):
    """u of the columns of Qg, Qu and dS [R], and u and 1 / u of all of dS; None without a scale."""

    gate: Any
    up: Any
    down: Any
    dh: Any
    dh_inverse: Any


@triton.jit
def _scale_of_Q(branch, sums, block, L, PARTS: tl.constexpr, TILES: tl.constexpr):
    """u of the columns of Q, in all columns of a block; None where dS needs no scale."""
    BLOCK_L: tl.constexpr = TILES.BLOCK_L
    BLOCK_R: tl.constexpr = TILES.BLOCK_R
    u = None
    if sums.dS_ptr is not None and branch.base_ptr.dtype.element_ty == tl.float16:
        largest = tl.zeros([BLOCK_R], tl.float32)
        for part in tl.static_range(PARTS):
            offs_l = (block * PARTS + part) * BLOCK_L + tl.arange(0, BLOCK_L)
            Q = load_scaled_B(branch, offs_l, tl.arange(0, BLOCK_R), L)
            largest = tl.maximum(largest, largest_finite(Q, 0))
        u, _ = power_of_two(largest)
    return u


@triton.jit
def scales_of(
    gate, up, down, gate_sums, up_sums, down_sums, block, L, first_m, last_m, tile_rows,
    PARTS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The Scales of a CTA."""
    BLOCK_R: tl.constexpr = TILES.BLOCK_R
    u_d, u, inverse = None, None, None
    if down.largest_ptr is not None:
        u, inverse = tile_scale(down.largest_ptr, first_m, last_m, tile_rows, down.R)
        if down_sums.T_ptr is not None:
            offs_r = tl.arange(0, BLOCK_R)
            u_d, _ = column_scales(down.largest_ptr, first_m, last_m, tile_rows, offs_r, down.R)
    u_g = _scale_of_Q(gate, gate_sums, block, L, PARTS, TILES)
    u_u = _scale_of_Q(up, up_sums, block, L, PARTS, TILES)
    return Scales(u_g, u_u, u_d, u, inverse)


@triton.jit
def scaled_Q(branch, Q, u, offs_l, L):
    """A tile of u Q, which is Q without a scale."""
    if u is not None:
        Q = load_Q(branch, offs_l, tl.arange(0, Q.shape[1]), L, u)
    return Q


@triton.jit
def load_dS(down, u, dtype, offs_m, offs_r, M):
    """Rows of u dS, of a number u or one for each column."""
    dS = load_tile(Matrix(down.dS_ptr, down.stride_dS, 1, M, down.R), offs_m, offs_r)
    if u is not None:
        dS *= u
    return dS.to(dtype)


@triton.jit
def scaled_dS(down, dS, u, offs_m, M):
    """Rows of u dS, u one for each column; dS itself without a scale."""
    if u is not None:
        dS = load_dS(down, u[None, :], dS.dtype, offs_m, tl.arange(0, dS.shape[1]), M)
    return dS


@triton.jit
def unscaled(tile, u):
    """A float32 tile as it is without the scale u of its columns."""
    if u is not None:
        tile *= inverse_of(u)[None, :]
    return tile
