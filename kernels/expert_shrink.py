"""S of the rows of experts, in one read of the rows where they are, and what goes with that read.

    S[p,r] = s · Σ_k X[t,k] F[e,k,r]           t the token of row p, e its expert, F = Aᵀ or B
    rows[p] = X[t], or [X[t] | S[p] | 0]       for products with W, or with [W | Q | 0]
    dots[p] = Σ_k X[t,k] v[e,k]                of dY with the bias: its part of dw
    back[order[p]] = p                         where each place of the flattened top_k_index went

The rows are sorted by expert, order[p] is the place of row p, and t = order[p] // top_k; without an
order they are where they belong. Rows of no expert get nothing but their place in back.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .environment import current_arch, precision_of
from .expert_policy import pick_gather
from .expert_tiles import expert_tile, experts_block, of_expert, programs
from .launch_plans import empty, launch
from .launch_policy import rank_block, settles_products
from .out_of_resources import OutOfResources, instead_of
from .profile import expert_shrink_name, expert_shrink_work, shown_as
from .scaling import scaled_columns
from .shrink import padding_of
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
_VARYING = ("M", "tokens")


class GatherTiles(NamedTuple):
    """A constant of a launch: rows, columns of X in one step, columns of S, experts; of what the
    rank, and the rows of F, are multiples."""

    BLOCK_M: int
    BLOCK_K: int
    BLOCK_R: int
    BLOCK_E: int
    UNIT: int
    FACTOR_UNIT: int


class Gathered(NamedTuple):
    """What a launch makes of the rows of experts; None, if it was not wanted."""

    rows: Any = None
    S: Any = None
    back: Any = None
    dots: Any = None


@triton.jit
def _walk_columns(
    x_mat, F_mat, rows_mat, vector_ptr, tokens, offs_m, offs_r,
    HAS_S: tl.constexpr, IS_GRAD: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """S [BLOCK_M, BLOCK_R] and the dots [BLOCK_M] in float32; copies the rows on its way."""
    dtype = x_mat.ptr.dtype.element_ty
    SCALES: tl.constexpr = IS_GRAD and dtype == tl.float16
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_R: tl.constexpr = TILES.BLOCK_R
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    dots = tl.zeros([BLOCK_M], tl.float32)
    for k in range(0, x_mat.size_1, TILES.BLOCK_K):
        offs_k = k + tl.arange(0, TILES.BLOCK_K)
        x = load_tile(x_mat, tokens, offs_k)
        if rows_mat.ptr is not None:
            store_tile(rows_mat, x, offs_m, offs_k)
        if vector_ptr is not None:
            vector = load_vector(vector_ptr, offs_k, x_mat.size_1)
            dots += tl.sum(x.to(tl.float32) * vector[None, :], 1)
        if HAS_S:
            F = load_tile(F_mat, offs_k, offs_r)
            if SCALES:
                operand, inverse = scaled_columns(F.to(tl.float32), dtype)
                acc += tl.dot(x, operand, input_precision=TARGET.PRECISION) * inverse
            else:
                acc = tl.dot(x, F.to(dtype), acc, input_precision=TARGET.PRECISION)
    return acc, dots


@triton.jit(do_not_specialize=_VARYING, **shown_as(expert_shrink_name, expert_shrink_work))
def expert_shrink(
    x_ptr, order_ptr, offsets_ptr, F_ptr, vector_ptr, s_ptr, rows_ptr, dots_ptr, back_ptr, scaling,
    experts, M, tokens, top_k, K, R, padded, stride_xm, stride_xk, stride_fe, stride_fk, stride_fr,
    stride_ve, stride_rows,
    IS_GRAD: tl.constexpr, WIDENS: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Program (tile of an expert's rows, chunk of the rank); the first chunk does all but S."""
    HAS_S: tl.constexpr = F_ptr is not None
    R = in_units(R, TILES.UNIT)
    stride_fe = in_units(stride_fe, TILES.FACTOR_UNIT)
    stride_fk = in_units(stride_fk, TILES.FACTOR_UNIT)
    tile = expert_tile(tl.program_id(0), offsets_ptr, experts, M, TILES.BLOCK_M, TILES.BLOCK_E)
    chunk = tl.program_id(1)
    if tile.first < tile.stop:
        offs_m = tile.first + tl.arange(0, TILES.BLOCK_M)
        offs_r = chunk * TILES.BLOCK_R + tl.arange(0, TILES.BLOCK_R)
        inside = offs_m < tile.stop
        # Beyond X for rows of other tiles, which so read nothing.
        where = tl.where(inside, offs_m, tokens)
        if order_ptr is not None:
            places = tl.load(order_ptr + offs_m, mask=inside, other=0)
            where = tl.where(inside, (places // top_k).to(tl.int32), tokens)
            if back_ptr is not None:
                tl.store(back_ptr + places, offs_m, mask=inside & (chunk == 0))
        if tile.index < experts:
            copied = tl.where(chunk == 0, tile.stop, 0)
            F = of_expert(F_ptr, tile.index, stride_fe)
            acc, dots = _walk_columns(
                Matrix(x_ptr, stride_xm, stride_xk, tokens, K),
                Matrix(F, stride_fk, stride_fr, K, R), Matrix(rows_ptr, stride_rows, 1, copied, K),
                of_expert(vector_ptr, tile.index, stride_ve), where, offs_m, offs_r,
                HAS_S, IS_GRAD, TILES, TARGET,
            )  # fmt: skip
            acc *= tl.cast(scaling, tl.float32)
            if s_ptr is not None:
                store_tile(Matrix(s_ptr, R, 1, tile.stop, R), acc, offs_m, offs_r)
            if WIDENS:
                # Columns of S beyond R are zero: so are those of F.
                wide = Matrix(rows_ptr + K, stride_rows, 1, tile.stop, padded)
                store_tile(wide, acc, offs_m, offs_r)
            if dots_ptr is not None:
                tl.store(dots_ptr + offs_m, dots, mask=inside & (chunk == 0))


def gather(
    x, order, offsets, F=None, scaling=1.0, *, vector=None, saves_S=True, widens=False,
    stores_rows=True, is_grad=False, config=None,
):  # fmt: skip
    """The rows of x [T, K] by expert, order [P] and offsets [E], as Gathered: rows [P, K], or with
    `widens` [x | S | 0] [P, K + padding], S [P, R] for F [E, K, R], back [P] (int32), and dots [P]
    (float32) for a vector [E, K].

    Without an order the rows are those of x. A gradient's S is float32 where x is float16.
    """
    M = x.shape[0] if order is None else order.shape[0]
    K, R = x.shape[1], 0 if F is None else F.shape[2]
    width = K + (padding_of(R) if widens else 0)
    S = None
    if R and saves_S:
        S = empty(x, M, R, dtype=shrunk_dtype(x.dtype) if is_grad else x.dtype)
    found = Gathered(
        rows=empty(x, M, width) if stores_rows else None,
        S=S,
        back=None if order is None else empty(order, M, dtype=torch.int32),
        dots=None if vector is None else empty(x, M, dtype=torch.float32),
    )
    _launch(
        config or pick_gather(x.dtype, R), x, order, offsets, F, float(scaling), vector, found,
        widens, is_grad,
    )  # fmt: skip
    return found


def shrunk_dtype(dtype):
    """The dtype of dS: float16 keeps full precision only down to 2⁻¹⁴."""
    return torch.float32 if dtype == torch.float16 else dtype


def _launch(config, x, order, offsets, F, scaling, vector, found, widens, is_grad):
    (tokens, K), experts = x.shape, offsets.shape[0]
    M = tokens if order is None else order.shape[0]
    R, BLOCK_R = (0, 16) if F is None else (F.shape[2], rank_block(F.shape[2]))
    if M == 0:
        return
    try:
        launch(
            expert_shrink, (programs(M, experts, config.BLOCK_M), max(1, -(-R // BLOCK_R))),
            x, order, offsets, F, vector, found.S, found.rows, found.dots, found.back, scaling,
            experts, M, tokens, 1 if order is None else M // tokens, K, R, padding_of(R),
            *x.stride(), *((0, 0, 0) if F is None else F.stride()),
            0 if vector is None else vector.stride(0),
            0 if found.rows is None else found.rows.stride(0),
            IS_GRAD=is_grad, WIDENS=widens,
            TILES=GatherTiles(
                config.BLOCK_M, config.BLOCK_L, BLOCK_R, experts_block(experts),
                *((1, 1) if F is None else (unit_of(R), factor_unit(F))),
            ),
            TARGET=Target(precision_of(x.dtype), SETTLES=settles_products(x.dtype, current_arch())),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    except OutOfResources:
        _launch(
            instead_of(config), x, order, offsets, F, scaling, vector, found, widens, is_grad
        )  # fmt: skip
