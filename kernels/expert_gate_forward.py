"""The gate of experts, which carries the low-rank parts of both projections.

    h[P,I] = act(gate) ⊙ up                 gate, up of u = base + S Q[e]ᵀ + bias[e]: see
    S2[P,R] = h A[e]ᵀ                        expert_gate_tiles; A[E,R,I] of the second projection

A CTA walks along some columns of a tile of rows of one expert and keeps their part of S2 in
registers; ranks beyond 64 add to it in memory, which nobody else reads. The CTA that arrives last
at a tile adds the parts in the order of their columns. h may have wider rows, whose end takes S2
once more and zeros: [h | S2 | 0]. Rows of no expert are not written.
"""

import torch
import triton
import triton.language as tl

from .environment import current_arch, precision_of
from .expert_gate_tiles import (
    acted,
    branches_of,
    expert_branch_in_eights,
    load_bases,
    shifted,
    with_low_rank,
)
from .expert_tiles import expert_tile, experts_block, of_expert, programs
from .gated_forward import add_to_parts
from .gated_policy import pick_expert_forward, tiles_each
from .gated_tiles import GatedTiles, are_eights, steps_of
from .launch_plans import empty, launch
from .launch_policy import rank_block, settles_products
from .out_of_resources import OutOfResources, instead_of
from .profile import expert_gate_forward_name, expert_gate_forward_work, shown_as
from .shrink import padding_of
from .sync_layout import ARRIVALS
from .tiles import Matrix, Target, in_units, load_tile, settled, store_tile
from .workspace import sync_words

# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = ("P", "tiles", "ranges")


@triton.jit
def _walk_columns(
    gate, up, expert, A_mat, parts_mat, h_mat, offs_m, first_tile, last_tile,
    GLU: tl.constexpr, IN_CHUNKS: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Store h of the tiles [first_tile, last_tile) of columns and this program's part of S2."""
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_L: tl.constexpr = TILES.BLOCK_L
    BLOCK_R: tl.constexpr = TILES.BLOCK_R
    HAS_S: tl.constexpr = A_mat.ptr is not None
    dtype = h_mat.ptr.dtype.element_ty
    last_m, L = h_mat.size_0, h_mat.size_1
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for tile in tl.range(first_tile, last_tile, num_stages=1):
        # Of a multiple that the compiler sees: with it, rows load in vectors.
        first_l = tile * BLOCK_L
        offs_l = first_l + tl.arange(0, BLOCK_L)
        x, u = load_bases(gate, up, offs_m, first_l, last_m, L, BLOCK_L, GLU.interleaved)
        x = with_low_rank(x, gate, expert, offs_m, offs_l, last_m, L, TILES, TARGET)
        a, _ = acted(x, GLU)
        u = with_low_rank(u, up, expert, offs_m, offs_l, last_m, L, TILES, TARGET)
        h = (a * shifted(u, GLU)).to(dtype)
        store_tile(h_mat, h, offs_m, offs_l)
        if HAS_S:
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
def _store_S(parts_ptr, ranges, s_mat, wide_mat, P, offs_m, TILES: tl.constexpr):
    """S2 of a tile of rows, its parts added in their order."""
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_R: tl.constexpr = TILES.BLOCK_R
    last_m, R = s_mat.size_0, s_mat.size_1
    for r in tl.range(0, wide_mat.size_1, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        S = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for i in range(0, ranges):
            part = Matrix(parts_ptr + tl.cast(i, tl.int64) * P * R, R, 1, last_m, R)
            S += load_tile(part, offs_m, offs_r)
        if s_mat.ptr is not None:
            store_tile(s_mat, S, offs_m, offs_r)
        if wide_mat.ptr is not None:
            store_tile(wide_mat, S, offs_m, offs_r)


@triton.jit(
    do_not_specialize=_VARYING, **shown_as(expert_gate_forward_name, expert_gate_forward_work)
)
def expert_gate_forward(
    gate, up, offsets_ptr, A_ptr, h_ptr, parts_ptr, s_ptr, wide_ptr, sync_ptr, P, L, R, experts,
    tiles, ranges, padded, stride_hm, stride_ae, stride_ar, stride_al,
    BLOCK_E: tl.constexpr, GLU: tl.constexpr, IN_CHUNKS: tl.constexpr, TILES: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Program (range of so many tiles of columns, tile of rows); wide_ptr: the end of h's rows."""
    if TILES.EIGHTS:
        gate = expert_branch_in_eights(gate)
        up = expert_branch_in_eights(up)
        R = in_units(R, 8)
    part, program = tl.program_id(0), tl.program_id(1)
    tile = expert_tile(program, offsets_ptr, experts, P, TILES.BLOCK_M, BLOCK_E)
    expert, last_m = tile.index, tile.stop
    if (expert < experts) & (tile.first < last_m):
        offs_m = tile.first + tl.arange(0, TILES.BLOCK_M)
        first_tile = part * tiles
        last_tile = tl.minimum(first_tile + tiles, tl.cdiv(L, TILES.BLOCK_L))
        part_ptr = of_expert(parts_ptr, part, tl.cast(P, tl.int64) * R)
        A_mat = Matrix(of_expert(A_ptr, expert, stride_ae), stride_al, stride_ar, L, R)
        _walk_columns(
            gate, up, expert, A_mat, Matrix(part_ptr, R, 1, last_m, R),
            Matrix(h_ptr, stride_hm, 1, last_m, L), offs_m, first_tile, last_tile,
            GLU, IN_CHUNKS, TILES, TARGET,
        )  # fmt: skip
        if parts_ptr is not None:
            # Every warp's part must be stored before one thread counts this CTA as arrived.
            tl.debug_barrier()
            arrived = tl.atomic_add(sync_ptr + ARRIVALS + program, 1, sem="acq_rel")
            if arrived == ranges - 1:
                tl.store(sync_ptr + ARRIVALS + program, 0)
                _store_S(
                    parts_ptr, ranges, Matrix(s_ptr, R, 1, last_m, R),
                    Matrix(wide_ptr, stride_hm, 1, last_m, padded), P, offs_m, TILES,
                )  # fmt: skip


def activate(member, offsets, glu, A=None, *, saves_S=True, widens=False, config=None):
    """h [P, I], or with `widens` [h | S2 | 0] [P, I + padding], and S2 [P, R] of the second
    projection for its A [E, R, I] (None unless saved), for an ExpertMember.

    offsets [E]: where the rows of each expert end.
    """
    base = member.base
    P, L = base.shape[0], base.shape[1] // 2
    R = 0 if A is None else A.shape[1]
    padded = padding_of(R)
    rows = empty(base, P, L + padded if widens else L)
    S = empty(base, P, R) if R and saves_S else None
    if R and not (saves_S or widens):
        A = None
    config = config or pick_expert_forward(
        base.dtype, max(R, member_rank(member)), plain=glu.is_plain
    )
    _launch(config, member, offsets, glu, A, rows, S, widens)
    return rows, S


def member_rank(member):
    """The rank of an ExpertMember, 0 without a low-rank part."""
    return 0 if member.S is None else member.S.shape[1]


def _launch(config, member, offsets, glu, A, rows, S, widens):
    base, arch, E = member.base, current_arch(), offsets.shape[0]
    P, L = base.shape[0], base.shape[1] // 2
    if P == 0 or L == 0:
        return
    count = programs(P, E, config.BLOCK_M)
    R = 0 if A is None else A.shape[1]
    each = tiles_each(config, count, L)
    ranges = -(-L // (config.BLOCK_L * each))
    parts = None if A is None else empty(base, ranges, P, R, dtype=torch.float32)
    BLOCK_R = rank_block(max(R, 1))
    if R > BLOCK_R:
        # Chunks are added in memory: of as many columns as load in vectors, or of few.
        BLOCK_R = 16 if R % 16 else 32
    steps = steps_of([member_rank(member)], base.dtype)
    branches = branches_of(member, glu)
    try:
        launch(
            expert_gate_forward, (ranges, count),
            *branches, offsets, A, rows, parts, S,
            rows[:, L:] if widens else None,
            None if A is None else sync_words(base.device, ARRIVALS.value + count),
            P, L, R, E, each, ranges, padding_of(R), rows.stride(0),
            *((0, 0, 0) if A is None else A.stride()),
            BLOCK_E=experts_block(E), GLU=glu, IN_CHUNKS=R > BLOCK_R,
            TILES=GatedTiles(
                config.BLOCK_M, config.BLOCK_L, BLOCK_R, *steps, are_eights(branches, R)
            ),
            TARGET=Target(
                precision_of(base.dtype), SETTLES=settles_products(base.dtype, arch)
            ),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    except OutOfResources:
        _launch(instead_of(config), member, offsets, glu, A, rows, S, widens)
