"""The activation of a gated MLP, which carries the low-rank parts of all three linears.

    h[M,I] = act(gate) ⊙ up               gate = base + Sg Qgᵀ, up = base + Su Quᵀ, Q = s · B
    S[M,R] = drop(h) Aᵀ                   of down, A[R,I]; h rounded as it is stored

A CTA walks along some columns of its rows and keeps their part of S in registers; ranks beyond 64
add to it in memory, which nobody else reads. The CTA that arrives last at a block of rows adds the
parts in the order of their columns. h may have wider rows, whose end takes S once more and zeros:
[h | S | 0], the operand of a product with [W | Q | 0] (nf4_decode.augmented).
"""

import torch
import triton
import triton.language as tl

from .activations import activated
from .dropout import NO_DROPOUT, Words, drop, drops_pairs, seed_of
from .environment import current_arch, precision_of
from .gated_policy import columns_each, pick_gated_forward
from .gated_tiles import (
    GatedTiles,
    are_eights,
    branch_in_eights,
    branch_of,
    load_branch,
    steps_of,
)
from .launch_plans import empty, launch
from .launch_policy import rank_block, settles_products
from .out_of_resources import OutOfResources, instead_of
from .profile import gated_forward_name, gated_forward_work, shown_as
from .shrink import padding_of
from .sync_layout import ARRIVALS
from .tiles import Matrix, Target, in_units, load_tile, settled, store_tile, sum_partials
from .workspace import sync_words

# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = ("M", "tiles", "ranges", "seed_low", "seed_high", "threshold")


@triton.jit
def add_to_parts(
    h, A_mat, parts_mat, offs_m, offs_l, is_first, BLOCK_R: tl.constexpr, TARGET: tl.constexpr
):
    """h Aᵀ of one tile, added to this program's part of S in memory, or in place of it."""
    for r in tl.range(0, A_mat.size_1, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        part = tl.dot(
            h, load_tile(A_mat, offs_l, offs_r).to(h.dtype), input_precision=TARGET.PRECISION
        )
        rows = tl.where(is_first, 0, parts_mat.size_0)
        before = Matrix(parts_mat.ptr, parts_mat.stride_0, 1, rows, parts_mat.size_1)
        store_tile(parts_mat, part + load_tile(before, offs_m, offs_r), offs_m, offs_r)
    # Other threads read what was stored here when they add the next tile.
    tl.debug_barrier()


@triton.jit
def _walk_columns(
    gate, up, A_mat, parts_mat, h_mat, words, offs_m, first_tile, last_tile,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, IN_CHUNKS: tl.constexpr, TILES: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Store h of the tiles [first_tile, last_tile) of columns and this program's part of S."""
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_L: tl.constexpr = TILES.BLOCK_L
    BLOCK_R: tl.constexpr = TILES.BLOCK_R
    HAS_S: tl.constexpr = A_mat.ptr is not None
    dtype = h_mat.ptr.dtype.element_ty
    M, L = h_mat.size_0, h_mat.size_1
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if DROPOUT:
        seed = seed_of(words)
    for tile in tl.range(first_tile, last_tile, num_stages=1):
        # Of a multiple that the compiler sees: with it, rows load in vectors.
        first_l = tile * BLOCK_L
        offs_l = first_l + tl.arange(0, BLOCK_L)
        x = load_branch(gate, offs_m, offs_l, M, L, TILES, TARGET)
        a, _ = activated(x, ACTIVATION)
        h = a * load_branch(up, offs_m, offs_l, M, L, TILES, TARGET)
        h = h.to(dtype)
        store_tile(h_mat, h, offs_m, offs_l)
        if HAS_S:
            if DROPOUT:
                h = drop(h, words, seed, offs_m, first_l, BLOCK_L, TARGET.PAIRS)
            if IN_CHUNKS:
                is_first = tile == first_tile
                add_to_parts(h, A_mat, parts_mat, offs_m, offs_l, is_first, BLOCK_R, TARGET)
            else:
                A = load_tile(A_mat, offs_l, tl.arange(0, BLOCK_R)).to(dtype)
                acc = tl.dot(h, A, acc, input_precision=TARGET.PRECISION)
                if TARGET.SETTLES:
                    acc = settled(acc)
    if HAS_S and not IN_CHUNKS:
        store_tile(parts_mat, acc, offs_m, tl.arange(0, BLOCK_R))


@triton.jit
def _store_S(
    parts_ptr, ranges, s_ptr, wide_ptr, stride_wide, padded, keep_scale, offs_m, M, R,
    DROPOUT: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """S of a block of rows, its parts added in their order."""
    for r in tl.range(0, padded, TILES.BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, TILES.BLOCK_R)
        S = sum_partials(parts_ptr, ranges, offs_m, offs_r, M, R, TILES.BLOCK_M, TILES.BLOCK_R)
        if DROPOUT:
            S *= tl.cast(keep_scale, tl.float32)
        if s_ptr is not None:
            store_tile(Matrix(s_ptr, R, 1, M, R), S, offs_m, offs_r)
        if wide_ptr is not None:
            store_tile(Matrix(wide_ptr, stride_wide, 1, M, padded), S, offs_m, offs_r)


@triton.jit(do_not_specialize=_VARYING, **shown_as(gated_forward_name, gated_forward_work))
def gated_forward(
    gate, up, A_ptr, h_ptr, parts_ptr, s_ptr, wide_ptr, sync_ptr, keep_scale, seed_ptr, seed_low,
    seed_high, threshold, M, L, R, tiles, ranges, padded, stride_hm, stride_ar, stride_al,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, IN_CHUNKS: tl.constexpr, TILES: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Program (range of so many tiles of columns, block of rows); wide_ptr: the end of h's rows."""
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    if TILES.EIGHTS:
        gate = branch_in_eights(gate)
        up = branch_in_eights(up)
        R = in_units(R, 8)
    part, block_m = tl.program_id(0), tl.program_id(1)
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_tile = part * tiles
    last_tile = tl.minimum(first_tile + tiles, tl.cdiv(L, TILES.BLOCK_L))
    if parts_ptr is not None:
        parts_mat = Matrix(parts_ptr + tl.cast(part, tl.int64) * M * R, R, 1, M, R)
    else:
        parts_mat = Matrix(parts_ptr, R, 1, M, R)
    _walk_columns(
        gate, up, Matrix(A_ptr, stride_al, stride_ar, L, R), parts_mat,
        Matrix(h_ptr, stride_hm, 1, M, L), Words(seed_ptr, seed_low, seed_high, threshold),
        offs_m, first_tile, last_tile,
        ACTIVATION, DROPOUT, IN_CHUNKS, TILES, TARGET,
    )  # fmt: skip
    if parts_ptr is not None:
        # Every warp's part of S must be stored before one thread counts this CTA as arrived.
        tl.debug_barrier()
        arrived = tl.atomic_add(sync_ptr + ARRIVALS + block_m, 1, sem="acq_rel")
        if arrived == ranges - 1:
            tl.store(sync_ptr + ARRIVALS + block_m, 0)
            _store_S(
                parts_ptr, ranges, s_ptr, wide_ptr, stride_hm, padded, keep_scale, offs_m, M, R,
                DROPOUT, TILES,
            )  # fmt: skip


def activate(
    gate, up, activation, A=None, dropout=NO_DROPOUT, *, saves_S=True, widens=False, config=None
):
    """h [M, I], or with `widens` [h | S | 0] [M, I + P], and S [M, R] of down for its A [R, I]
    (None unless saved). gate and up are a Member each."""
    (M, L), base = gate.base.shape, gate.base
    R = 0 if A is None else A.shape[0]
    widest = max(R, *(0 if m.S is None else m.S.shape[1] for m in (gate, up)))
    padded = padding_of(R)
    rows = empty(base, M, L + padded if widens else L)
    S = empty(base, M, R) if R and saves_S else None
    makes_S = R > 0 and (saves_S or widens)
    config = config or pick_gated_forward(base.dtype, widest)
    _launch(config, gate, up, activation, A if makes_S else None, dropout, rows, S, widens)
    return rows, S


def _launch(config, gate, up, activation, A, dropout, rows, S, widens):
    (M, L), base, arch = gate.base.shape, gate.base, current_arch()
    if M == 0 or L == 0:
        return
    R = 0 if A is None else A.shape[0]
    blocks, tiles = -(-M // config.BLOCK_M), -(-L // config.BLOCK_L)
    each = columns_each(config, M, L)
    ranges = -(-tiles // each)
    parts = None if A is None else empty(base, ranges, M, R, dtype=torch.float32)
    BLOCK_R = rank_block(max(R, 1))
    if R > BLOCK_R:
        # Chunks are added in memory: of as many columns as load in vectors, or of few.
        BLOCK_R = 16 if R % 16 else 32
    branches = branch_of(gate), branch_of(up)
    steps = steps_of([branch.R for branch in branches], base.dtype)
    seed, seed_low, seed_high, threshold = dropout.words()
    try:
        launch(
            gated_forward, (ranges, blocks),
            *branches, A, rows, parts, S, rows[:, L:] if widens else None,
            None if A is None else sync_words(base.device, ARRIVALS.value + blocks),
            dropout.keep_scale, seed, seed_low, seed_high, threshold,
            M, L, R, each, ranges, padding_of(R), rows.stride(0),
            *((0, 0) if A is None else A.stride()),
            ACTIVATION=activation, DROPOUT=dropout.p > 0.0 and A is not None,
            IN_CHUNKS=R > BLOCK_R,
            TILES=GatedTiles(
                config.BLOCK_M, config.BLOCK_L, BLOCK_R, *steps, are_eights(branches, R)
            ),
            TARGET=Target(
                precision_of(base.dtype), drops_pairs(base.dtype, arch),
                settles_products(base.dtype, arch),
            ),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    except OutOfResources:
        _launch(instead_of(config), gate, up, activation, A, dropout, rows, S, widens)
