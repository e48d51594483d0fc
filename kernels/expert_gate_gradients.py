"""du and dw of the gate of experts, for what expert_gate_backward has no registers for.

    v[P,I] = base + dS2[P,R] A[e]       dw[P] = ⟨v, h⟩       dh = w v       du of dgate and dup

as in expert_gate_backward. w h takes the place of v, for the gradient of A; the gradients of the
factors are those of any projection of experts. Ranks are as large as one likes. A float16 operand
is scaled by a power of two of its tile: dS2 is then given in float32.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .environment import precision_of
from .expert_gate_forward import member_rank
from .expert_gate_tiles import (
    acted,
    branches_of,
    expert_branch_in_eights,
    load_bases,
    load_weights,
    shifted,
    store_gradients,
    through_shifted,
    with_low_rank,
)
from .expert_tiles import expert_tile, experts_block, of_expert, programs
from .gated_policy import pick_expert_gradients, tiles_each
from .gated_tiles import GatedTiles, are_eights, steps_of
from .launch_plans import empty, launch
from .out_of_resources import OutOfResources, instead_of
from .profile import expert_gate_gradients_name, expert_gate_gradients_work, shown_as
from .scaling import largest_finite, power_of_two
from .tiles import Matrix, Target, in_units, load_tile, store_tile

# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = ("P", "tiles")


class DownRows(NamedTuple):
    """dS2 [P, R] and A [E, R, I] of the second projection, the routing weights w [T, k], and the
    place in it of each row; without a low-rank part dS_ptr is None and R is 0."""

    dS_ptr: Any
    A_ptr: Any
    w_ptr: Any
    order_ptr: Any
    R: int
    stride_dS: int
    stride_ae: int
    stride_ar: int
    stride_al: int


@triton.jit
def _scale_of_rows(dS_mat, offs_m, BLOCK_E: tl.constexpr):
    """A power of two for the rows of dS as float16 operands, and its inverse."""
    largest = tl.zeros([offs_m.shape[0]], tl.float32)
    for r in tl.range(0, dS_mat.size_1, BLOCK_E, num_stages=1):
        dS = load_tile(dS_mat, offs_m, r + tl.arange(0, BLOCK_E)).to(tl.float32)
        largest = tl.maximum(largest, largest_finite(dS, 1))
    return power_of_two(largest)


@triton.jit
def _low_rank(
    down, expert, offs_m, offs_l, u, inverse, last_m, L,
    DTYPE: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """dS2 A[e] of a tile."""
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_L: tl.constexpr = TILES.BLOCK_L
    BLOCK_E: tl.constexpr = TILES.BLOCK_E
    dS_mat = Matrix(down.dS_ptr, down.stride_dS, 1, last_m, down.R)
    A_ptr = of_expert(down.A_ptr, expert, down.stride_ae)
    part = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    for r in tl.range(0, down.R, BLOCK_E, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_E)
        dS = load_tile(dS_mat, offs_m, offs_r)
        if u is not None:
            dS = dS.to(tl.float32) * u[:, None]
        A = load_tile(Matrix(A_ptr, down.stride_al, down.stride_ar, L, down.R), offs_l, offs_r)
        part = tl.dot(dS.to(DTYPE), tl.trans(A.to(DTYPE)), part, input_precision=TARGET.PRECISION)
    if u is not None:
        part *= inverse[:, None]
    return part


@triton.jit
def _walk_columns(
    gate, up, down, expert, v_mat, dgate_mat, dup_mat, offs_m, first_tile, last_tile,
    NEEDS_w: tl.constexpr, STORES_h: tl.constexpr, GLU: tl.constexpr, TILES: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Store dgate, dup and w h of the tiles [first_tile, last_tile) of columns; gives ⟨v, h⟩."""
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_L: tl.constexpr = TILES.BLOCK_L
    dtype = v_mat.ptr.dtype.element_ty
    last_m, L = v_mat.size_0, v_mat.size_1
    w = load_weights(down.w_ptr, down.order_ptr, offs_m, last_m)
    dw = tl.zeros([BLOCK_M], tl.float32)
    u, inverse = None, None
    if down.dS_ptr is not None and dtype == tl.float16:
        dS_mat = Matrix(down.dS_ptr, down.stride_dS, 1, last_m, down.R)
        u, inverse = _scale_of_rows(dS_mat, offs_m, TILES.BLOCK_E)
    for tile in tl.range(first_tile, last_tile, num_stages=1):
        first_l = tile * BLOCK_L
        offs_l = first_l + tl.arange(0, BLOCK_L)
        x, y = load_bases(gate, up, offs_m, first_l, last_m, L, BLOCK_L, GLU.interleaved)
        x = with_low_rank(x, gate, expert, offs_m, offs_l, last_m, L, TILES, TARGET)
        a, slope = acted(x, GLU)
        y = with_low_rank(y, up, expert, offs_m, offs_l, last_m, L, TILES, TARGET)
        factor = shifted(y, GLU)
        v = load_tile(v_mat, offs_m, offs_l).to(tl.float32)
        if down.dS_ptr is not None:
            v += _low_rank(
                down, expert, offs_m, offs_l, u, inverse, last_m, L, dtype, TILES, TARGET
            )
        if NEEDS_w:
            dw += tl.sum(v * (a * factor), 1)
        dh = v * w[:, None]
        dup = through_shifted(dh * a, y, GLU)
        store_gradients(
            dgate_mat, dup_mat, dh * (factor * slope), dup, offs_m, first_l, GLU.interleaved
        )
        if STORES_h:
            store_tile(v_mat, a * factor * w[:, None], offs_m, offs_l)
    return dw


@triton.jit(
    do_not_specialize=_VARYING, **shown_as(expert_gate_gradients_name, expert_gate_gradients_work)
)
def expert_gate_gradients(
    gate, up, down, offsets_ptr, v_ptr, dgate_ptr, dup_ptr, dw_ptr, P, L, experts, tiles, stride_v,
    stride_du,
    STORES_h: tl.constexpr, BLOCK_E: tl.constexpr, GLU: tl.constexpr, TILES: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Program (range of so many tiles of columns, tile of rows)."""
    if TILES.EIGHTS:
        gate = expert_branch_in_eights(gate)
        up = expert_branch_in_eights(up)
        down = DownRows(
            down.dS_ptr, down.A_ptr, down.w_ptr, down.order_ptr, in_units(down.R, 8),
            in_units(down.stride_dS, 8), down.stride_ae, down.stride_ar, down.stride_al,
        )  # fmt: skip
    part = tl.program_id(0)
    tile = expert_tile(tl.program_id(1), offsets_ptr, experts, P, TILES.BLOCK_M, BLOCK_E)
    expert, last_m = tile.index, tile.stop
    if (expert < experts) & (tile.first < last_m):
        offs_m = tile.first + tl.arange(0, TILES.BLOCK_M)
        first_tile = part * tiles
        last_tile = tl.minimum(first_tile + tiles, tl.cdiv(L, TILES.BLOCK_L))
        dw = _walk_columns(
            gate, up, down, expert, Matrix(v_ptr, stride_v, 1, last_m, L),
            Matrix(dgate_ptr, stride_du, 1, last_m, L), Matrix(dup_ptr, stride_du, 1, last_m, L),
            offs_m, first_tile, last_tile, dw_ptr is not None, STORES_h, GLU, TILES, TARGET,
        )  # fmt: skip
        if dw_ptr is not None:
            first = dw_ptr + tl.cast(part, tl.int64) * P
            tl.store(first + offs_m, dw, mask=offs_m < last_m)


def gradients(
    member, v, w, order, offsets, glu, dS=None, A=None, *, out, stores_h, needs_w, config=None
):
    """Stores du in `out` [P, 2I], which may be the memory of the base product of u, and with
    `stores_h` w h in that of v [P, I], the base product; gives the partials of dw [J, P] in float32
    or None.

    w [T, k], contiguous, and the place in it of each row, order [P]. dS [P, R], for float16 in
    float32, and A [E, R, I] are those of the second projection.
    """
    (P, L), dtype, E = v.shape, v.dtype, offsets.shape[0]
    config = config or pick_expert_gradients(dtype)
    count = programs(P, E, config.BLOCK_M)
    R = 0 if dS is None else dS.shape[1]
    down = DownRows(None, None, w, order, 0, 0, 0, 0, 0)
    if R:
        down = DownRows(dS, A, w, order, R, dS.stride(0), *A.stride())
    each = tiles_each(config, count, L)
    ranges = -(-L // (config.BLOCK_L * each))
    step = steps_of([member_rank(member), R], dtype)
    branches = branches_of(member, glu)
    eights = are_eights(branches, down.R, down.stride_dS)
    dw = empty(v, ranges, P, dtype=torch.float32) if needs_w else None
    try:
        launch(
            expert_gate_gradients, (ranges, count),
            *branches, down, offsets, v, *glu.halves(out, 1), dw, P, L, E, each,
            v.stride(0), out.stride(0),
            STORES_h=stores_h, BLOCK_E=experts_block(E), GLU=glu,
            TILES=GatedTiles(config.BLOCK_M, config.BLOCK_L, step[0], *step, eights),
            TARGET=Target(precision_of(dtype)),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    except OutOfResources:
        return gradients(
            member, v, w, order, offsets, glu, dS, A, out=out, stores_h=stores_h, needs_w=needs_w,
            config=instead_of(config),
        )  # fmt: skip
    return dw
