"""One launch for a linear layer with a low-rank branch: the forward pass and the input gradient.

    forward  y[M,N]  = g ⊙ (x[M,K] W[N,K]ᵀ + S[M,R] Qᵀ) + bias[N]     S = drop(x) Aᵀ
    dX       dX[M,K] = dY[M,N] (g ⊙ W[N,K]) + drop'(dS[M,R] A)     dS = dY (g ⊙ Q), or its parts
    with     Q[N,R]  = s · b dᵀ ⊙ B

Both are out[M, N'] = Σ X[M, K'] W' + S · outᵀ with the letters exchanged, so one kernel serves
both. The sum is over the members of a launch: one, or in dX the layers that read the same x. In the
forward pass the first of them makes S for all, and the others find their columns of it.

Its tiles are handed out by an atomic ticket, a group of row blocks after the other. The first
tickets of a group produce S for a few rows each (the shrink, or the sum of the partials that the
strips kernel left), store it and release a flag per row block (shrink_tiles). The others are
ordinary GEMM tiles: their whole K-loop runs first, then they acquire the flag of their row block,
add S · outᵀ to the same accumulator and store the tile once (gemm_tiles). Both read the same rows
of X at the same time, so one of them finds them in the L2 cache. A producer waits for nobody and
tickets are taken in start order, so there is no schedule in which it deadlocks.

sync holds int32 zeros (sync_layout.py); the last CTA that needs a word leaves zeros behind.
"""

import functools
import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .descriptors import descriptors_of
from .dropout import NO_DROPOUT, Words, drops_pairs
from .environment import current_arch, precision_of
from .gemm_tiles import Output, consume, leaves_early
from .launch_plans import empty, launch
from .launch_policy import (
    expand_block,
    pick_gemm,
    rank_block,
    settles_products,
    uses_mma_sync,
)
from .nf4_tile import weight_arguments
from .out_of_resources import OutOfResources, instead_of
from .profile import gemm_name, gemm_work, shown_as
from .scaling import Shrunk, new_gradient
from .shrink_tiles import ShrunkPointers, Spans, produce
from .sync_layout import FLAGS, TICKET, leave
from .tiles import NO_GAINS, Target, factor_unit, unit_of
from .workspace import debug_options, sync_words

# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = ("M", "num_chunks", "rows_per_sample", "seed_low", "seed_high", "threshold")


class Member(NamedTuple):
    """What a launch reads of one layer: X [M, K], its weight W' [K, N] and its low-rank branch.

    in_ptr [K, R_made], or the parts of S that partials_ptr holds, makes the columns of S from
    first_r on; where a launch makes those of several layers, in_ptr is that of the first. out_ptr
    [N, R] is multiplied with the first R of them. Without in_ptr they are there already, without
    out_ptr (R = 0) there is no low-rank branch.
    """

    x_ptr: Any
    w_ptr: Any
    absmax_ptr: Any
    absmax2_ptr: Any
    code2_ptr: Any
    offset_ptr: Any
    code_ptr: Any
    partials_ptr: Any
    in_ptr: Any
    out_ptr: Any
    scaling: float
    K: int
    R: int
    R_made: int
    first_r: int
    stride_xm: int
    stride_xk: int
    stride_wk: int
    stride_wn: int
    stride_in_l: int
    stride_in_r: int
    stride_out_l: int
    stride_out_r: int
    IS_NF4: tl.constexpr
    BLOCKSIZE: tl.constexpr
    BLOCKSIZE2: tl.constexpr
    SHARING: tl.constexpr


class GemmTiles(NamedTuple):
    """A constant of a launch: how much of each dimension a tile of y takes (M, N; K and E in one
    step) and a tile of S (S, R; K in one step); of what the ranks and the rows of S, and the rows
    of B, are multiples."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    BLOCK_E: int
    BLOCK_S: int
    GROUP_M: int
    MASK_PARTS: int
    UNIT: int
    FACTOR_UNIT: int


@triton.jit
def _place_of(ticket, M, N, num_chunks, TILES: tl.constexpr):
    """Of a ticket: whether it produces, its BLOCK_S rows or BLOCK_M rows, its chunk or BLOCK_N
    columns.

    Groups of GROUP_M row blocks follow each other: their columns of W sit in the L2 cache, and so
    do the rows of X that its producers and its GEMM tiles read.
    """
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_S: tl.constexpr = TILES.BLOCK_S
    GROUP: tl.constexpr = TILES.GROUP_M * BLOCK_M
    columns = tl.cdiv(N, TILES.BLOCK_N)
    tickets = GROUP // BLOCK_S * num_chunks + TILES.GROUP_M * columns
    group = ticket // tickets
    within = ticket % tickets
    rows = tl.minimum(M - group * GROUP, GROUP)
    producers = tl.cdiv(rows, BLOCK_S) * num_chunks
    produces = within < producers
    if produces:
        across, down = within // num_chunks, within % num_chunks
        across += group * (GROUP // BLOCK_S)
    else:
        blocks = tl.cdiv(rows, BLOCK_M)
        across, down = (within - producers) % blocks, (within - producers) // blocks
        across += group * TILES.GROUP_M
    return produces, across, down


@triton.jit
def _work_off(
    ticket, members, num_partials, factors, ranks, x_descs, w_descs, shrunk, gains, out, spans,
    words, sync_ptr, num_chunks, IS_GRAD: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr,
    TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Produce S, or a tile of the output, at the place of a ticket."""
    produces, across, down = _place_of(ticket, out.M, out.N, num_chunks, TILES)
    if out.y_ptr is None or (sync_ptr is not None and produces):
        produce(
            across, down, members, num_partials, factors, ranks, shrunk, gains, spans, words,
            sync_ptr, out.M, IS_GRAD, DROPOUT, TILES, TARGET,
        )  # fmt: skip
    else:
        consume(
            across, down, members, x_descs, w_descs, num_partials, num_chunks, shrunk, gains, out,
            spans, words, sync_ptr, IS_GRAD, DROPOUT, EVEN_K, TILES, TARGET,
        )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING, **shown_as(gemm_name, gemm_work))
def ticketed_gemm(
    members, num_partials, factors, ranks, s_ptr, largest_ptr, gains, bias_ptr, y_ptr, v_ptr,
    spans_ptr, sync_ptr, keep_scale, seed_ptr, seed_low, seed_high, threshold, M, N, num_chunks,
    rows_per_sample, stride_sm, stride_ym, x_desc_0, w_desc_0, x_desc_1, w_desc_1, x_desc_2,
    w_desc_2, IS_GRAD: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr,
    TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """One ticket: rows BLOCK_S × BLOCK_R of S, or a tile BLOCK_M × BLOCK_N of the output.

    IS_GRAD tells the two uses apart: the forward pass (in = A, out = B with its gains, g on the
    output) and the input gradient (in = B with its gains, out = A, g on X). Gains, V and spans are
    those of a launch with one member. What a launch has none of is None: without s_ptr there is no
    low-rank branch, without sync_ptr S is there already, without y_ptr only S is wanted. x_desc_i
    and w_desc_i are tensor descriptors of member i's X and W, those of all members or none. factors
    are the A of all layers whose S the launch makes, where they are several.
    """
    MAKES_S: tl.constexpr = sync_ptr is not None
    ticket = tl.program_id(0)
    if MAKES_S:
        ticket = tl.atomic_add(sync_ptr + TICKET, 1, sem="relaxed")
    _work_off(
        # In Triton 3.5 an argument's inner tuples forget their constants at an `if`; sums do not.
        ticket, members + (), num_partials, factors, ranks,  # noqa: RUF005
        (x_desc_0, x_desc_1, x_desc_2), (w_desc_0, w_desc_1, w_desc_2),
        ShrunkPointers(s_ptr, largest_ptr, stride_sm), gains,
        Output(y_ptr, v_ptr, bias_ptr, M, N, stride_ym), Spans(spans_ptr, rows_per_sample),
        Words(seed_ptr, seed_low, seed_high, threshold, keep_scale), sync_ptr, num_chunks,
        IS_GRAD, DROPOUT, EVEN_K, TILES, TARGET,
    )  # fmt: skip
    if MAKES_S and not leaves_early(members, y_ptr, IS_GRAD, DROPOUT, TILES):
        leave(sync_ptr, tl.num_programs(0), M, TILES.BLOCK_M, False)


class Layer(NamedTuple):
    """What a launcher is given of a layer: X is x [M, K] in the forward pass, dY [M, N] in the
    gradient; weight [N, K], A [R, K], B [N, R]; partials [J, M, R] are the parts of dS that the
    strips kernel left, and without them the launch forms dS itself."""

    X: Any
    weight: Any
    A: Any = None
    B: Any = None
    scaling: float = 1.0
    partials: Any = None


def forward(
    x, weight, A=None, B=None, scaling=1.0, *, bias=None, gains=NO_GAINS, dropout=NO_DROPOUT,
    rank_spans=None, saves_V=False, S=None, made=None, others=(), config=None,
):  # fmt: skip
    """y [M, N], S [M, R] (None without an adapter) and V [M, N] (None unless saved) in one launch.

    x [M, K], weight [N, K], rank_spans [samples, 2]; V is y before g and the bias. Layers that
    share x share a shrink: the first makes S [M, ΣR], given as `made`, of its A and those of the
    `others` at once, all of one dtype and equal strides, and uses its first columns; the others get
    their columns as S and make none.
    """
    y = empty(x, x.shape[0], weight.shape[0])
    layer = Layer(x, weight, A if S is None else None, B, scaling)
    if layer.A is not None:
        made = empty(x, x.shape[0], A.shape[0]) if made is None else made
        S = made[:, : B.shape[1]]
    V = empty(y, *y.shape) if saves_V else None
    if config is None:
        # With g, V may be stored beside y.
        R = 0 if S is None else math.gcd(S.shape[1], S.stride(0))
        config = pick_gemm(x.shape[0], x.dtype, current_arch(), has_gain=gains.g is not None, R=R)
    _launch(
        config, [layer], y=y, V=V, shrunk=Shrunk(S), bias=bias, gains=gains, dropout=dropout,
        rank_spans=rank_spans, is_grad=False, others=others,
    )  # fmt: skip
    return y, S, V


def grad_input(
    layers, dropout=NO_DROPOUT, *, gains=NO_GAINS, rank_spans=None, wants_dX=True, config=None
):
    """dX [M, K] = Σ dY_i (g ⊙ W_i) + drop'(dS_i A_i) (None unless wanted) and dS, a Shrunk with the
    dS_i side by side, in one launch.

    Each is a Layer with X = dY; gains and rank_spans are those of one layer alone.
    """
    dY, weight = layers[0][:2]
    ranks = [layer.A.shape[0] for layer in layers if layer.A is not None]
    if config is None:
        # One rank that is no multiple of 8 is enough. With g, W is scaled on its way.
        picks = {
            "has_gain": gains.g is not None,
            "masks_dX": dropout.p > 0.0,
            "R": math.gcd(*ranks),
        }
        config = pick_gemm(dY.shape[0], dY.dtype, current_arch(), **picks)
    dX = empty(dY, dY.shape[0], weight.shape[1]) if wants_dX else None
    dS = new_gradient(dY, sum(ranks), config.BLOCK_S) if ranks else Shrunk(None)
    _launch(
        config, layers, y=dX, V=None, shrunk=dS, bias=None, gains=gains, dropout=dropout,
        rank_spans=rank_spans, is_grad=True,
    )  # fmt: skip
    return dX, dS


def _launch(
    config, layers, *, y, V, shrunk, bias, gains, dropout, rank_spans, is_grad, others=()
):  # fmt: skip
    """shrunk: S without what scales it, or dS; others: the A of layers after the one in `layers`,
    whose S is made, too."""
    S, x = shrunk.values, layers[0].X
    factors = (layers[0].A, *others) if others else None
    members, num_partials, first_r, BLOCK_R, BLOCK_E = [], [], 0, 0, config.MAX_E
    even_K, packed = True, False
    for layer in layers:
        member = _member(layer, first_r, config, is_grad)
        if others:
            member = member._replace(R_made=member.R_made + sum([A.shape[0] for A in others]))
        members.append(member)
        num_partials.append(0 if layer.partials is None else layer.partials.shape[0])
        first_r += member.R_made
        BLOCK_R = max(BLOCK_R, rank_block(member.R_made))
        BLOCK_E = min(BLOCK_E, expand_block(member.R, x.dtype if S is None else S.dtype))
        even_K = even_K and member.K % config.BLOCK_K == 0
        packed = packed or member.IS_NF4.value
    BLOCK_R = min(BLOCK_R, config.MAX_R)
    M, N = x.shape[0], 0 if y is None else y.shape[1]
    # Without columns there are producers alone.
    y = y if N else None
    makes_S = members[0].in_ptr is not None
    arch = current_arch()
    num_chunks = sum([-(-member.R_made // BLOCK_R) for member in members])
    blocks = -(-M // config.BLOCK_M)
    tickets = -(-M // config.BLOCK_S) * num_chunks + blocks * -(-N // config.BLOCK_N)
    if tickets == 0:
        return
    seed, seed_low, seed_high, threshold = dropout.words()
    descriptors = descriptors_of(layers, config, arch, is_grad)
    is_described = descriptors[0] is not None
    try:
        launch(
            ticketed_gemm, (tickets,),
            tuple(members), tuple(num_partials),
            factors, None if factors is None else tuple([A.shape[0] for A in factors]),
            S, shrunk.largest, gains, bias, y, V, rank_spans,
            sync_words(x.device, FLAGS.value + blocks) if makes_S else None,
            dropout.keep_scale, seed, seed_low, seed_high, threshold,
            M, N, num_chunks, M if rank_spans is None else M // rank_spans.shape[0],
            0 if S is None else S.stride(0), N, *descriptors,
            IS_GRAD=is_grad, DROPOUT=dropout.p > 0.0, EVEN_K=is_described or even_K,
            TILES=GemmTiles(
                config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, BLOCK_R, BLOCK_E, config.BLOCK_S,
                config.GROUP_M, config.MASK_PARTS,
                *_units(S, layers, members),
            ),
            TARGET=Target(
                PRECISION=precision_of(x.dtype), PAIRS=drops_pairs(x.dtype, arch),
                SETTLES=settles_products(x.dtype, arch), SHUFFLES=arch is not None,
                MMA_SYNC=uses_mma_sync(config, x.dtype, arch),
            ),
            num_warps=config.num_warps, num_stages=config.num_stages,
            # absmax = code2 · absmax2 + offset has to be rounded twice, as bitsandbytes does.
            enable_fp_fusion=not packed,
            **debug_options(),
        )  # fmt: skip
    except OutOfResources:
        _launch(
            instead_of(config), layers, y=y, V=V, shrunk=shrunk, bias=bias, gains=gains,
            dropout=dropout, rank_spans=rank_spans, is_grad=is_grad, others=others,
        )  # fmt: skip


def _units(S, layers, members):
    """UNIT and FACTOR_UNIT of a launch."""
    if S is None:
        return 1, 1
    ranks = [n for member in members for n in (member.R, member.R_made, member.first_r)]
    factors = [layer.B for layer in layers if layer.B is not None]
    return unit_of(S.stride(0), *ranks), factor_unit(*factors)


def _member(layer, first_r, config, is_grad):
    pointers, w_strides, switches = weight_arguments(layer.weight, config, is_grad)
    A_rows = None if layer.A is None else layer.A.T
    in_factor, out_factor = (layer.B, A_rows) if is_grad else (A_rows, layer.B)
    R = 0 if out_factor is None else out_factor.shape[1]
    R_made = 0 if in_factor is None else in_factor.shape[1]
    return Member(
        layer.X, *pointers, layer.partials, in_factor, out_factor, float(layer.scaling),
        layer.X.shape[1], R, R_made, first_r,
        *layer.X.stride(), *w_strides, *_strides(in_factor), *_strides(out_factor),
        **{name: _constant(value) for name, value in switches.items()},
    )  # fmt: skip


# One object for each value: Triton compares the constants of a launch with those of earlier ones.
_constant = functools.lru_cache(maxsize=None, typed=True)(tl.constexpr)


def _strides(factor):
    return (0, 0) if factor is None else factor.stride()
