"""Products of the rows of experts, with W, with the low-rank factors, or with both in one sum.

    out[p,l] = Σ_k X[p,k] W[e,l,k] + s · Σ_r S[p,r] F[e,l,r] + bias[e,l]         e: of row p
    out[p,l] += s · Σ_r S[p,r] F[e,l,r] + bias[e,l]                             without X

F is B, or of dX Aᵀ. Rows of no expert are zeros in the end. A dS in float32, as float16 has it, is
scaled row by row before it becomes an operand.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .environment import precision_of
from .expert_policy import PRODUCT_K, PRODUCT_K_FLOAT32, pick_product
from .expert_tiles import expert_tile, experts_block, of_expert, programs
from .launch_plans import empty, launch
from .launch_policy import expand_block
from .out_of_resources import OutOfResources, instead_of
from .profile import expert_product_name, expert_product_work, shown_as
from .scaling import largest_finite, power_of_two
from .tiles import (
    Matrix,
    Target,
    factor_unit,
    in_units,
    load_tile,
    load_vector,
    store_tile,
    unit_of,
)

# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = ("M",)


class ProductTiles(NamedTuple):
    """A constant of a launch: rows and columns of an output tile, columns of X and of S in one
    step, experts; of what the rank and the rows of S, and the rows of F, are multiples."""

    BLOCK_M: int
    BLOCK_L: int
    BLOCK_K: int
    BLOCK_R: int
    BLOCK_E: int
    UNIT: int
    FACTOR_UNIT: int


@triton.jit
def _add_base(acc, x_mat, W_mat, offs_m, offs_l, TILES: tl.constexpr, TARGET: tl.constexpr):
    """acc + X Wᵀ; W_mat is Wᵀ [K, L]."""
    for k in range(0, x_mat.size_1, TILES.BLOCK_K):
        offs_k = k + tl.arange(0, TILES.BLOCK_K)
        x = load_tile(x_mat, offs_m, offs_k)
        W = load_tile(W_mat, offs_k, offs_l).to(x.dtype)
        acc = tl.dot(x, W, acc, input_precision=TARGET.PRECISION)
    return acc


@triton.jit
def _add_low_rank(
    acc, s_mat, F_mat, scaling, offs_m, offs_l,
    DTYPE: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """acc + s · S Fᵀ."""
    SCALES: tl.constexpr = s_mat.ptr.dtype.element_ty != DTYPE
    for r in tl.range(0, F_mat.size_1, TILES.BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, TILES.BLOCK_R)
        S = load_tile(s_mat, offs_m, offs_r)
        factor = load_tile(F_mat, offs_l, offs_r).to(tl.float32) * tl.cast(scaling, tl.float32)
        factor = factor.to(DTYPE)
        if SCALES:
            u, inverse = power_of_two(largest_finite(S, 1))
            part = tl.dot(
                (S * u[:, None]).to(DTYPE), tl.trans(factor), input_precision=TARGET.PRECISION
            )
            acc += part * inverse[:, None]
        else:
            acc = tl.dot(S, tl.trans(factor), acc, input_precision=TARGET.PRECISION)
    return acc


@triton.jit(do_not_specialize=_VARYING, **shown_as(expert_product_name, expert_product_work))
def expert_product(
    x_ptr, W_ptr, s_ptr, F_ptr, bias_ptr, out_ptr, offsets_ptr, scaling, experts, M, K, L, R,
    columns, stride_xm, stride_xk, stride_we, stride_wl, stride_wk, stride_sm, stride_fe, stride_fl,
    stride_fr, stride_be,
    TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """A tile BLOCK_M × BLOCK_L of the output; those of the same rows follow each other."""
    dtype = out_ptr.dtype.element_ty
    R, stride_sm = in_units(R, TILES.UNIT), in_units(stride_sm, TILES.UNIT)
    stride_fe = in_units(stride_fe, TILES.FACTOR_UNIT)
    stride_fl = in_units(stride_fl, TILES.FACTOR_UNIT)
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_L: tl.constexpr = TILES.BLOCK_L
    program, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    tile = expert_tile(program, offsets_ptr, experts, M, BLOCK_M, TILES.BLOCK_E)
    if tile.first < tile.stop:
        offs_m = tile.first + tl.arange(0, BLOCK_M)
        offs_l = column * BLOCK_L + tl.arange(0, BLOCK_L)
        out_mat = Matrix(out_ptr, L, 1, tile.stop, L)
        acc = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
        if tile.index < experts:
            if x_ptr is not None:
                W = of_expert(W_ptr, tile.index, stride_we)
                acc = _add_base(
                    acc, Matrix(x_ptr, stride_xm, stride_xk, tile.stop, K),
                    Matrix(W, stride_wk, stride_wl, K, L), offs_m, offs_l, TILES, TARGET,
                )  # fmt: skip
            else:
                acc += load_tile(out_mat, offs_m, offs_l).to(tl.float32)
            if s_ptr is not None:
                F = of_expert(F_ptr, tile.index, stride_fe)
                acc = _add_low_rank(
                    acc, Matrix(s_ptr, stride_sm, 1, tile.stop, R),
                    Matrix(F, stride_fl, stride_fr, L, R), scaling, offs_m, offs_l,
                    dtype, TILES, TARGET,
                )  # fmt: skip
            if bias_ptr is not None:
                bias = of_expert(bias_ptr, tile.index, stride_be)
                acc += load_vector(bias, offs_l, L)[None, :]
        store_tile(out_mat, acc, offs_m, offs_l)


class LowRank(NamedTuple):
    """S [P, R], F [E, L, R] and the scaling of a low-rank part."""

    S: torch.Tensor
    F: torch.Tensor
    scaling: float = 1.0


def product(x, W, offsets, low_rank=None, bias=None, config=None):
    """out [P, L] of x [P, K], its rows sorted by expert, and W [E, L, K], with a LowRank and a bias
    [E, L], in one sum."""
    out = empty(x, x.shape[0], W.shape[1])
    _launch(config, x, W, offsets, low_rank, bias, out)
    return out


def add_(out, offsets, low_rank=None, bias=None, config=None):
    """out [P, L] plus a LowRank and a bias [E, L], in place; rows of no expert become zeros."""
    _launch(config, None, None, offsets, low_rank, bias, out)
    return out


def _launch(config, x, W, offsets, low_rank, bias, out):
    (M, L), experts = out.shape, offsets.shape[0]
    S, F, scaling = (None, None, 1.0) if low_rank is None else low_rank
    config = config or pick_product(out.dtype, has_base=x is not None)
    columns = -(-L // config.BLOCK_L)
    if M == 0:
        return
    R = 0 if S is None else S.shape[1]
    step = PRODUCT_K_FLOAT32 if out.dtype == torch.float32 else PRODUCT_K
    BLOCK_R = 16 if S is None else min(config.MAX_R, expand_block(R, S.dtype))
    try:
        launch(
            expert_product, (programs(M, experts, config.BLOCK_M) * columns,),
            x, W, S, F, bias, out, offsets, float(scaling), experts, M,
            0 if x is None else x.shape[1], L, R, columns,
            *((0, 0) if x is None else x.stride()), *((0, 0, 0) if W is None else W.stride()),
            0 if S is None else S.stride(0), *((0, 0, 0) if F is None else F.stride()),
            0 if bias is None else bias.stride(0),
            TILES=ProductTiles(
                config.BLOCK_M, config.BLOCK_L, step, BLOCK_R, experts_block(experts),
                *((1, 1) if S is None else (unit_of(R, S.stride(0)), factor_unit(F))),
            ),
            TARGET=Target(precision_of(out.dtype)),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    except OutOfResources:
        _launch(instead_of(config), x, W, offsets, low_rank, bias, out)
