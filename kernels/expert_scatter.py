"""The rows of experts back at their tokens: each token's rows added up, in their order.

    out[t,l] = Σ_j w[t,j] y[back[t · k + j], l]          w the routing weights [T, k], or 1
    dw[t,j] = Σ_i parts[i, row] + dots[row]              row = back[t · k + j]

A row of no expert, at offsets[E - 1] or beyond, adds nothing.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .expert_policy import pick_scatter
from .launch_plans import empty, launch
from .out_of_resources import OutOfResources, instead_of
from .profile import (
    expert_scatter_name,
    expert_scatter_work,
    expert_weights_name,
    expert_weights_work,
    shown_as,
)
from .tiles import Matrix, load_tile, store_tile

# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = ("tokens", "places", "parts")
# Places of a program of expert_weights.
_PLACES = 512


class ScatterTiles(NamedTuple):
    """A constant of a launch: tokens and columns of a tile."""

    BLOCK_M: int
    BLOCK_L: int


@triton.jit(do_not_specialize=_VARYING, **shown_as(expert_scatter_name, expert_scatter_work))
def expert_scatter(
    y_ptr, back_ptr, w_ptr, offsets_ptr, out_ptr, tokens, top_k, experts, L, columns, stride_ym,
    TILES: tl.constexpr,
):  # fmt: skip
    """A tile BLOCK_M × BLOCK_L of out; those of the same tokens follow each other."""
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_L: tl.constexpr = TILES.BLOCK_L
    block, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    offs_t = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_l = column * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = offs_t < tokens
    rows = tl.load(offsets_ptr + experts - 1).to(tl.int32)
    y_mat = Matrix(y_ptr, stride_ym, 1, rows, L)
    acc = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    for j in range(0, top_k):
        place = offs_t.to(tl.int64) * top_k + j
        row = tl.load(back_ptr + place, mask=inside, other=rows)
        y = load_tile(y_mat, row, offs_l).to(tl.float32)
        if w_ptr is not None:
            y *= tl.load(w_ptr + place, mask=inside, other=0.0).to(tl.float32)[:, None]
            # 0 · NaN: whatever the weight of a row that is not there.
            y = tl.where((row < rows)[:, None], y, 0.0)
        acc += y
    store_tile(Matrix(out_ptr, L, 1, tokens, L), acc, offs_t, offs_l)


def scatter(y, back, offsets, tokens, w=None, config=None):
    """out [T, L], in the dtype of y [P, L]; back [P] as expert_shrink makes it, w [T, k]
    contiguous."""
    out = empty(y, tokens, y.shape[1])
    _launch(config or pick_scatter(), y, back, offsets, w, out)
    return out


def _launch(config, y, back, offsets, w, out):
    tokens, L = out.shape
    columns = -(-L // config.BLOCK_L)
    if tokens == 0:
        return
    try:
        launch(
            expert_scatter, (-(-tokens // config.BLOCK_M) * columns,),
            y, back, w, offsets, out, tokens, back.shape[0] // tokens, offsets.shape[0], L, columns,
            y.stride(0),
            TILES=ScatterTiles(config.BLOCK_M, config.BLOCK_L),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    except OutOfResources:
        _launch(instead_of(config), y, back, offsets, w, out)


@triton.jit(do_not_specialize=_VARYING, **shown_as(expert_weights_name, expert_weights_work))
def expert_weights(
    parts_ptr, dots_ptr, back_ptr, offsets_ptr, dw_ptr, places, parts, experts, BLOCK: tl.constexpr
):  # fmt: skip
    """dw of a block of places, the parts of a row in their order."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < places
    stop = tl.load(offsets_ptr + experts - 1).to(tl.int32)
    row = tl.load(back_ptr + offs, mask=inside, other=stop)
    there = row < stop
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, parts):
        total += tl.load(parts_ptr + tl.cast(i, tl.int64) * places + row, mask=there, other=0.0)
    if dots_ptr is not None:
        total += tl.load(dots_ptr + row, mask=there, other=0.0)
    tl.store(dw_ptr + offs, total.to(dw_ptr.dtype.element_ty), mask=inside)


def weights(parts, dots, back, offsets, w):
    """dw [T, k], like w: Σ_i parts[i, row] + dots[row] for the row of each place, and zero for a
    row of no expert; parts [J, P] and dots [P], or None, in float32."""
    dw = empty(w, *w.shape)
    places = back.shape[0]
    if places:
        launch(
            expert_weights, (-(-places // _PLACES),),
            parts, dots, back, offsets, dw, places, parts.shape[0], offsets.shape[0],
            BLOCK=_PLACES, num_warps=4,
        )  # fmt: skip
    return dw
