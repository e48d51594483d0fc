"""The low-rank part of an output by itself; a product with W can be added to it afterwards.

    forward  y[M,N]  = S[M,R] Qᵀ + bias[N]           Q[N,R] = s · b dᵀ ⊙ B
    dX       dX[M,K] = drop'(Σ dS[M,R] A[R,K])       the sum is over the layers that read the same x

Both are S · outᵀ, as in ticketed_gemm. In the forward pass one launch writes the y of several
layers, each from its columns of S [M, ΣR]. Everything but the output is small, so a tile reads all
it needs of S and the factor, and the launch is bound by what it stores.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .dropout import NO_DROPOUT, Words, keep_mask, seed_of
from .environment import precision_of
from .launch_plans import empty, launch
from .launch_policy import expand_block, pick_expand
from .out_of_resources import OutOfResources, instead_of
from .profile import expand_name, expand_work, shown_as
from .scaling import tile_scale
from .shrink_tiles import ShrunkPointers
from .tiles import (
    NO_GAINS,
    Matrix,
    Target,
    factor_unit,
    in_units,
    load_factor,
    load_tile,
    load_vector,
    store_tile,
    unit_of,
)

# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = ("M", "columns", "seed_low", "seed_high", "threshold")


class Member(NamedTuple):
    """What a launch reads of one layer: out [L, R], B or Aᵀ, to be multiplied with the columns of S
    from first_r on; its y [M, L] and bias [L] or None. In dX the y of the first is that of all."""

    out_ptr: Any
    y_ptr: Any
    bias_ptr: Any
    scaling: float
    L: int
    R: int
    first_r: int
    stride_out_l: int
    stride_out_r: int


class ExpandTiles(NamedTuple):
    """A constant of a launch: rows and columns of an output tile, columns of S in one step; of what
    S's ranks and rows and the factors' rows are multiples."""

    BLOCK_M: int
    BLOCK_L: int
    BLOCK_R: int
    UNIT: int
    FACTOR_UNIT: int


@triton.jit
def _add_member(
    acc, member, shrunk, gains, u, offs_m, offs_l, M,
    IS_GRAD: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """acc + u · S · outᵀ of one member; u is None where S is an operand as it is."""
    dtype = member.y_ptr.dtype.element_ty
    R = in_units(member.R, TILES.UNIT)
    S_ptr = shrunk.ptr + in_units(member.first_r, TILES.UNIT)
    s_mat = Matrix(S_ptr, in_units(shrunk.stride, TILES.UNIT), 1, M, R)
    stride_l = in_units(member.stride_out_l, TILES.FACTOR_UNIT)
    out_mat = Matrix(member.out_ptr, stride_l, member.stride_out_r, member.L, R)
    BLOCK_R: tl.constexpr = TILES.BLOCK_R
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        S = load_tile(s_mat, offs_m, offs_r)
        factor = load_factor(out_mat, gains, member.scaling, offs_l, offs_r, not IS_GRAD, dtype)
        if u is not None:
            S = (S * u).to(dtype)
        acc = tl.dot(S, tl.trans(factor), acc, input_precision=TARGET.PRECISION)
    return acc


@triton.jit
def _store_outputs(
    members, ranks, shrunk, gains, offs_m, block_l, M, TILES: tl.constexpr, TARGET: tl.constexpr
):
    """The tile of the member that block_l falls to, of all their blocks of columns side by side."""
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_L: tl.constexpr = TILES.BLOCK_L
    # Not len(members): Triton 3.6 fails on the length of a tuple that holds None.
    for i in tl.static_range(len(ranks)):
        L = members[i].L
        blocks = tl.cdiv(L, BLOCK_L)
        if (block_l >= 0) & (block_l < blocks):
            offs_l = block_l * BLOCK_L + tl.arange(0, BLOCK_L)
            acc = _add_member(
                tl.zeros([BLOCK_M, BLOCK_L], tl.float32), members[i], shrunk, gains, None,
                offs_m, offs_l, M, False, TILES, TARGET,
            )  # fmt: skip
            if members[i].bias_ptr is not None:
                acc += load_vector(members[i].bias_ptr, offs_l, L)[None, :]
            store_tile(Matrix(members[i].y_ptr, L, 1, M, L), acc, offs_m, offs_l)
        block_l -= blocks


@triton.jit
def _store_gradient(
    members, ranks, shrunk, tile_rows, gains, words, offs_m, block_m, block_l, M,
    DROPOUT: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """A tile of drop'(Σ over members of dS · A)."""
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_L: tl.constexpr = TILES.BLOCK_L
    L = members[0].L
    offs_l = block_l * BLOCK_L + tl.arange(0, BLOCK_L)
    u, keep_scale = None, tl.cast(words.keep_scale, tl.float32)
    SCALES: tl.constexpr = shrunk.largest is not None
    if SCALES:
        first_m = block_m * BLOCK_M
        last_m = tl.minimum(first_m + BLOCK_M, M)
        u, inverse = tile_scale(shrunk.largest, first_m, last_m, tile_rows, shrunk.stride)
        keep_scale *= inverse
    acc = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    for i in tl.static_range(len(ranks)):
        acc = _add_member(acc, members[i], shrunk, gains, u, offs_m, offs_l, M, True, TILES, TARGET)
    if DROPOUT:
        keep = keep_mask(words, seed_of(words), offs_m, block_l * BLOCK_L, BLOCK_L)
        acc = tl.where(keep, acc * keep_scale, 0.0)
    elif SCALES:
        acc *= inverse
    store_tile(Matrix(members[0].y_ptr, L, 1, M, L), acc, offs_m, offs_l)


@triton.jit(do_not_specialize=_VARYING, **shown_as(expand_name, expand_work))
def expand(
    members, ranks, s_ptr, largest_ptr, gains, keep_scale, seed_ptr, seed_low, seed_high,
    threshold, M, columns, tile_rows, stride_sm,
    IS_GRAD: tl.constexpr, DROPOUT: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """A tile BLOCK_M × BLOCK_L of an output; those of the same rows follow each other."""
    block_m, block_l = tl.program_id(0) // columns, tl.program_id(0) % columns
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    shrunk = ShrunkPointers(s_ptr, largest_ptr, stride_sm)
    if IS_GRAD:
        _store_gradient(
            members, ranks, shrunk, tile_rows, gains,
            Words(seed_ptr, seed_low, seed_high, threshold, keep_scale),
            offs_m, block_m, block_l, M, DROPOUT, TILES, TARGET,
        )  # fmt: skip
    else:
        # In Triton 3.5 an argument's inner tuples forget their constants at an `if`; sums do not.
        _store_outputs(
            members + (), ranks, shrunk, gains, offs_m, block_l, M, TILES, TARGET,  # noqa: RUF005
        )  # fmt: skip


class Layer(NamedTuple):
    """What a launcher is given of a layer: factor [L, R], B or Aᵀ, the s of B and the bias [L]."""

    factor: Any
    scaling: float = 1.0
    bias: Any = None


def outputs(S, dtype, layers, gains=NO_GAINS):
    """S_i Q_iᵀ + bias [M, N_i] in `dtype` of every layer, for its columns of S [M, ΣR]; the gains b
    and d are those of one layer alone."""
    ys = [empty(S, S.shape[0], layer.factor.shape[0], dtype=dtype) for layer in layers]
    _launch(None, ys, S, None, 1, layers, gains=gains, dropout=NO_DROPOUT, is_grad=False)
    return ys


def input_gradient(dS, dtype, factors, dropout=NO_DROPOUT):
    """drop'(Σ dS_i A_i) [M, K] in `dtype`, for the A [R_i, K] and dS, a Shrunk with the dS_i side
    by side."""
    dX = empty(dS.values, dS.values.shape[0], factors[0].shape[1], dtype=dtype)
    layers = [Layer(A.T) for A in factors]
    _launch(
        None, [dX], dS.values, dS.largest, dS.tile_rows, layers, gains=NO_GAINS, dropout=dropout,
        is_grad=True,
    )  # fmt: skip
    return dX


def _launch(config, ys, S, largest, tile_rows, layers, *, gains, dropout, is_grad):
    dtype = ys[0].dtype
    config = config or pick_expand(dtype)
    members, ranks, first_r, columns, BLOCK_R = [], [], 0, 0, config.MAX_R
    for i, layer in enumerate(layers):
        y, (L, R) = ys[0 if is_grad else i], layer.factor.shape
        strides = layer.factor.stride()
        members.append(
            Member(layer.factor, y, layer.bias, float(layer.scaling), L, R, first_r, *strides)
        )
        ranks.append(R)
        first_r += R
        columns += -(-L // config.BLOCK_L)
        BLOCK_R = min(BLOCK_R, expand_block(R, S.dtype))
    M = S.shape[0]
    if is_grad:
        columns = -(-ys[0].shape[1] // config.BLOCK_L)
    if M == 0 or columns == 0:
        return
    seed, seed_low, seed_high, threshold = dropout.words()
    try:
        launch(
            expand, (-(-M // config.BLOCK_M) * columns,),
            tuple(members), tuple(ranks), S, largest, gains,
            dropout.keep_scale, seed, seed_low, seed_high, threshold,
            M, columns, tile_rows, S.stride(0),
            IS_GRAD=is_grad, DROPOUT=dropout.p > 0.0,
            TILES=ExpandTiles(
                config.BLOCK_M, config.BLOCK_L, BLOCK_R, unit_of(S.stride(0), *ranks),
                factor_unit(*[layer.factor for layer in layers]),
            ),
            TARGET=Target(precision_of(dtype)),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    except OutOfResources:
        _launch(
            instead_of(config), ys, S, largest, tile_rows, layers, gains=gains, dropout=dropout,
            is_grad=is_grad,
        )  # fmt: skip
