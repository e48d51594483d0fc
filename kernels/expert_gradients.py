"""Gradients of the factors of experts: each expert's own rows, walked in their order.

    T[e] = s · Σ_p X[t]ᵀ (w[p] S[p])           [L, R]: dB of dY and S, dAᵀ of x and dS
    sums[e] = Σ_p w[p] X[t]                    [L]: dbias for X = dY

p are the rows of expert e, t the token of row p or row p itself, w the routing weights or 1. A
program keeps some columns of an expert and one chunk of the rank in registers until the expert's
last row: nothing is added up afterwards. An expert without rows has zeros.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .environment import current_arch, precision_of
from .expert_policy import pick_expert_strips
from .expert_tiles import expert_rows, of_expert
from .launch_plans import empty, launch
from .launch_policy import rank_block, settles_products
from .out_of_resources import OutOfResources, instead_of
from .profile import expert_gradients_name, expert_gradients_work, shown_as
from .scaling import scaled_columns
from .tiles import Matrix, Target, factor_unit, in_units, load_tile, settled, store_tile, unit_of

# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = ("tokens",)


class GradientTiles(NamedTuple):
    """A constant of a launch: rows, columns of X and columns of S in a tile; of what the rank and
    the rows of S, and the rows of T, are multiples."""

    BLOCK_M: int
    BLOCK_L: int
    BLOCK_R: int
    UNIT: int
    FACTOR_UNIT: int


@triton.jit
def _load_narrow(s_mat, weights, offs_m, offs_r, DTYPE: tl.constexpr):
    """w ⊙ S of one tile as an operand, and 1 / u of its columns where it is scaled."""
    IS_WIDE: tl.constexpr = s_mat.ptr.dtype.element_ty != DTYPE
    S = load_tile(s_mat, offs_m, offs_r)
    if weights is not None:
        S = S.to(tl.float32) * weights[:, None]
    if IS_WIDE:
        return scaled_columns(S, DTYPE)
    else:
        return S.to(DTYPE), S  # which nobody reads: no tuple holds None, before Triton 3.7


@triton.jit
def _walk_rows(
    x_mat, s_mat, order_ptr, w_ptr, top_k, start, stop, offs_l, offs_r,
    NEEDS_T: tl.constexpr, SUMS: tl.constexpr, GATHERS: tl.constexpr, TILES: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """T [BLOCK_L, BLOCK_R] and the sums [BLOCK_L] over the rows [start, stop)."""
    dtype = x_mat.ptr.dtype.element_ty
    BLOCK_L: tl.constexpr = TILES.BLOCK_L
    BLOCK_R: tl.constexpr = TILES.BLOCK_R
    T = tl.zeros([BLOCK_L, BLOCK_R], tl.float32)
    sums = tl.zeros([BLOCK_L], tl.float32)
    for m in range(start, stop, TILES.BLOCK_M):
        offs_m = m + tl.arange(0, TILES.BLOCK_M)
        inside = offs_m < stop
        where = tl.where(inside, offs_m, x_mat.size_0)
        weights = None
        if order_ptr is not None:
            places = tl.load(order_ptr + offs_m, mask=inside, other=0)
            if GATHERS:
                where = tl.where(inside, (places // top_k).to(tl.int32), x_mat.size_0)
            if w_ptr is not None:
                weights = tl.load(w_ptr + places, mask=inside, other=0.0).to(tl.float32)
        x = load_tile(x_mat, where, offs_l)
        if NEEDS_T:
            S, inverse = _load_narrow(s_mat, weights, offs_m, offs_r, dtype)
            if s_mat.ptr.dtype.element_ty != dtype:
                T += tl.dot(tl.trans(x), S, input_precision=TARGET.PRECISION) * inverse
            else:
                T = tl.dot(tl.trans(x), S, T, input_precision=TARGET.PRECISION)
                if w_ptr is not None and TARGET.SETTLES:
                    T = settled(T)
        if SUMS:
            wide = x.to(tl.float32)
            if weights is not None:
                wide *= weights[:, None]
            sums += tl.sum(wide, 0)
    return T, sums


@triton.jit(do_not_specialize=_VARYING, **shown_as(expert_gradients_name, expert_gradients_work))
def expert_gradients(
    x_ptr, s_ptr, order_ptr, w_ptr, offsets_ptr, T_ptr, sums_ptr, scaling, tokens, top_k, L, R,
    stride_xm, stride_xl, stride_sm, stride_te, stride_tl, stride_tr,
    GATHERS: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Program (block of columns, expert, chunk of the rank)."""
    NEEDS_T: tl.constexpr = T_ptr is not None
    SUMS: tl.constexpr = sums_ptr is not None
    R, stride_sm = in_units(R, TILES.UNIT), in_units(stride_sm, TILES.UNIT)
    stride_te = in_units(stride_te, TILES.FACTOR_UNIT)
    stride_tl = in_units(stride_tl, TILES.FACTOR_UNIT)
    expert, chunk = tl.program_id(1), tl.program_id(2)
    start, stop = expert_rows(expert, offsets_ptr)
    offs_l = tl.program_id(0) * TILES.BLOCK_L + tl.arange(0, TILES.BLOCK_L)
    offs_r = chunk * TILES.BLOCK_R + tl.arange(0, TILES.BLOCK_R)
    T, sums = _walk_rows(
        Matrix(x_ptr, stride_xm, stride_xl, tokens, L), Matrix(s_ptr, stride_sm, 1, stop, R),
        order_ptr, w_ptr, top_k, start, stop, offs_l, offs_r,
        NEEDS_T, SUMS, GATHERS, TILES, TARGET,
    )  # fmt: skip
    if NEEDS_T:
        T_mat = Matrix(of_expert(T_ptr, expert, stride_te), stride_tl, stride_tr, L, R)
        store_tile(T_mat, T * tl.cast(scaling, tl.float32), offs_l, offs_r)
    if SUMS:
        row = of_expert(sums_ptr, expert, L)
        inside = (offs_l < L) & (chunk == 0)
        tl.store(row + offs_l, sums.to(sums_ptr.dtype.element_ty), mask=inside)


def gradients(
    x, S, offsets, *, scaling=1.0, factor=None, is_A=False, bias=None, order=None, w=None,
    gathers=False, config=None,
):  # fmt: skip
    """The gradient of a factor, B [E, L, R] or with `is_A` A [E, R, L], for x [P, L] and S [P, R],
    and that of a bias [E, L], in their dtypes, contiguous; None for what is not given.

    With `gathers` x [T, L] has the tokens, whose rows `order` [P] sorts; routing weights w [T, k]
    multiply the rows, by their order.
    """
    T = dbias = None
    if factor is not None:
        T = empty(x, *factor.shape, dtype=factor.dtype)
    if bias is not None:
        dbias = empty(x, *bias.shape, dtype=bias.dtype)
    as_B = T.transpose(1, 2) if is_A else T
    config = config or pick_expert_strips(x.dtype, 0 if T is None else S.shape[1], current_arch())
    _launch(config, x, S, offsets, float(scaling), as_B, dbias, order, w, gathers)
    return T, dbias


def _launch(config, x, S, offsets, scaling, T, dbias, order, w, gathers):
    (tokens, L), experts, arch = x.shape, offsets.shape[0], current_arch()
    R, BLOCK_R = (0, 16) if T is None else (T.shape[2], rank_block(T.shape[2]))
    if T is None and dbias is None:
        return
    places = tokens if order is None else order.shape[0]
    try:
        launch(
            expert_gradients, (-(-L // config.BLOCK_L), experts, max(1, -(-R // BLOCK_R))),
            x, None if T is None else S, order, w, offsets, T, dbias, scaling, tokens,
            max(1, places // max(1, tokens)) if gathers else 1, L, R, *x.stride(),
            0 if T is None else S.stride(0), *((0, 0, 0) if T is None else T.stride()),
            GATHERS=gathers,
            TILES=GradientTiles(
                config.BLOCK_M, config.BLOCK_L, BLOCK_R,
                *((1, 1) if T is None else (unit_of(R, S.stride(0)), factor_unit(T))),
            ),
            TARGET=Target(precision_of(x.dtype), SETTLES=settles_products(x.dtype, arch)),
            num_warps=config.num_warps,
            # As in strips: a pipelined tile that is summed and multiplied loses its wait.
            num_stages=1 if dbias is not None else config.num_stages,
        )  # fmt: skip
    except OutOfResources:
        _launch(instead_of(config), x, S, offsets, scaling, T, dbias, order, w, gathers)
