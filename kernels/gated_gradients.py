"""dgate and dup of a gated MLP by themselves, for what gated_backward has no registers for.

    dh[M,I] = base + drop'(dS[M,R] A[R,I])     dgate = dh ⊙ up ⊙ act'(gate)     dup = dh ⊙ act(gate)

h takes the place of dh, for the gradient of A; the gradients of the factors are those of any layer
(strips). Ranks are as large as one likes.
"""

import triton
import triton.language as tl

from .activations import activated
from .dropout import NO_DROPOUT, Words, keep_mask, seed_of
from .environment import precision_of
from .gated_policy import pick_gated_gradients
from .gated_tiles import (
    GatedTiles,
    are_eights,
    branch_in_eights,
    branch_of,
    down_in_eights,
    down_of,
    load_branch,
    steps_of,
)
from .launch_plans import launch
from .out_of_resources import OutOfResources, instead_of
from .profile import gated_gradients_name, gated_gradients_work, shown_as
from .scaling import Shrunk, tile_scale
from .tiles import Matrix, Target, load_tile, store_tile

# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = ("M", "seed_low", "seed_high", "threshold")


@triton.jit
def _add_step(
    part, down, u, offs_m, offs_l, r, M, L,
    BLOCK_E: tl.constexpr, DTYPE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """part + u · dS A of the columns of the rank from r on."""
    offs_r = r + tl.arange(0, BLOCK_E)
    dS = load_tile(Matrix(down.dS_ptr, down.stride_dS, 1, M, down.R), offs_m, offs_r)
    if u is not None:
        dS = (dS * u).to(DTYPE)
    A_mat = Matrix(down.A_ptr, down.stride_al, down.stride_ar, L, down.R)
    A = load_tile(A_mat, offs_l, offs_r).to(DTYPE)
    return tl.dot(dS, tl.trans(A), part, input_precision=TARGET.PRECISION)


@triton.jit
def _low_rank(
    down, words, tile_rows, offs_m, block_m, first_l, M, L,
    DROPOUT: tl.constexpr, DTYPE: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """drop'(dS A) of a tile."""
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_L: tl.constexpr = TILES.BLOCK_L
    BLOCK_E: tl.constexpr = TILES.BLOCK_E
    offs_l = first_l + tl.arange(0, BLOCK_L)
    u, keep_scale = None, tl.cast(words.keep_scale, tl.float32)
    SCALES: tl.constexpr = down.largest_ptr is not None
    if SCALES:
        last_m = tl.minimum((block_m + 1) * BLOCK_M, M)
        u, inverse = tile_scale(down.largest_ptr, block_m * BLOCK_M, last_m, tile_rows, down.R)
        keep_scale *= inverse
    part = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    if TILES.ONE_STEP:
        part = _add_step(part, down, u, offs_m, offs_l, 0, M, L, BLOCK_E, DTYPE, TARGET)
    else:
        for r in tl.range(0, down.R, BLOCK_E, num_stages=1):
            part = _add_step(part, down, u, offs_m, offs_l, r, M, L, BLOCK_E, DTYPE, TARGET)
    if DROPOUT:
        keep = keep_mask(words, seed_of(words), offs_m, first_l, BLOCK_L)
        part = tl.where(keep, part * keep_scale, 0.0)
    elif SCALES:
        part *= inverse
    return part


@triton.jit(do_not_specialize=_VARYING, **shown_as(gated_gradients_name, gated_gradients_work))
def gated_gradients(
    gate, up, down, dh_ptr, dgate_ptr, dup_ptr, keep_scale, seed_ptr, seed_low, seed_high,
    threshold, M, L, columns, tile_rows, stride_dh, stride_dgate, stride_dup,
    STORES_h: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, TILES: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """One tile; those of the same rows follow each other."""
    if TILES.EIGHTS:
        gate = branch_in_eights(gate)
        up = branch_in_eights(up)
        down = down_in_eights(down)
    block_m, block_l = tl.program_id(0) // columns, tl.program_id(0) % columns
    first_l = block_l * TILES.BLOCK_L
    offs_m = block_m * TILES.BLOCK_M + tl.arange(0, TILES.BLOCK_M)
    offs_l = first_l + tl.arange(0, TILES.BLOCK_L)
    a, slope = activated(load_branch(gate, offs_m, offs_l, M, L, TILES, TARGET), ACTIVATION)
    u = load_branch(up, offs_m, offs_l, M, L, TILES, TARGET)
    dh_mat = Matrix(dh_ptr, stride_dh, 1, M, L)
    dh = load_tile(dh_mat, offs_m, offs_l).to(tl.float32)
    if down.dS_ptr is not None:
        dh += _low_rank(
            down, Words(seed_ptr, seed_low, seed_high, threshold, keep_scale), tile_rows, offs_m,
            block_m, first_l, M, L, DROPOUT, dh_ptr.dtype.element_ty, TILES, TARGET,
        )  # fmt: skip
    store_tile(Matrix(dgate_ptr, stride_dgate, 1, M, L), dh * (u * slope), offs_m, offs_l)
    store_tile(Matrix(dup_ptr, stride_dup, 1, M, L), dh * a, offs_m, offs_l)
    if STORES_h:
        store_tile(dh_mat, a * u, offs_m, offs_l)


def gradients(
    gate, up, dh, activation, dS=None, A=None, dropout=NO_DROPOUT, *, outs, stores_h, config=None
):
    """Stores dgate and dup in `outs`, two [M, I], which may be the memory of gate and up; with
    `stores_h` h in that of dh, its base product.

    dS, a Shrunk, and A [R, I] are down's.
    """
    (M, L), dtype = dh.shape, dh.dtype
    config = config or pick_gated_gradients(dtype)
    dS = Shrunk(None) if dS is None else dS
    branches, down = (branch_of(gate), branch_of(up)), down_of(dS, A)
    columns = -(-L // config.BLOCK_L)
    step = steps_of([branches[0].R, branches[1].R, down.R], dtype)
    seed, seed_low, seed_high, threshold = dropout.words()
    try:
        launch(
            gated_gradients, (-(-M // config.BLOCK_M) * columns,),
            *branches, down, dh, *outs, dropout.keep_scale, seed, seed_low, seed_high, threshold,
            M, L, columns, dS.tile_rows, dh.stride(0), outs[0].stride(0), outs[1].stride(0),
            STORES_h=stores_h, ACTIVATION=activation, DROPOUT=dropout.p > 0.0 and down.R > 0,
            TILES=GatedTiles(
                config.BLOCK_M, config.BLOCK_L, step[0], *step,
                are_eights(branches, down.R, down.stride_dS),
            ),
            TARGET=Target(precision_of(dtype)),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    except OutOfResources:
        gradients(
            gate, up, dh, activation, dS, A, dropout, outs=outs, stores_h=stores_h,
            config=instead_of(config),
        )  # fmt: skip
