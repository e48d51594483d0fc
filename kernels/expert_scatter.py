"""The rows of experts back at their tokens: each token's rows added up, in their order.

    out[t,l] = Σ_j w[t,j] y[back[t · k + j], l]          w the routing weights [T, k], or 1

A row of no expert, at offsets[E - 1] or beyond, adds nothing.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .expert_policy import pick_scatter
from .launch_plans import empty, launch
from .out_of_resources import OutOfResources, instead_of
from .profile import expert_scatter_name, expert_scatter_work, shown_as
from .tiles import Matrix, load_tile, store_tile

# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = ("tokens",)


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
