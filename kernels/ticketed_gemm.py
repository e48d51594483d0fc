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

sync holds int32 zeros [ticket, finished, flag of row block 0, 1, …]; the CTA that finishes last
leaves zeros behind.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .configs import (
    current_arch,
    expand_block,
    pick_gemm,
    precision_of,
    rank_block,
    settles_products,
    uses_mma_sync,
)
from .descriptors import descriptors_of
from .dropout import drops_pairs
from .fitting import drops_to_smaller
from .gemm_tiles import consume
from .nf4_tile import weight_arguments
from .scaling import Shrunk, new_gradient
from .shrink_tiles import produce
from .tiles import FLAGS
from .workspace import debug_options, sync_words

# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = (
    "num_partials", "M", "num_chunks", "rows_per_sample", "seed_low", "seed_high", "threshold",
)  # fmt: skip


class Member(NamedTuple):
    """What a launch reads of one layer: X [M, K], its weight W' [K, N] and its low-rank branch.

    in_ptr [K, R_made], or the parts of S that partials_ptr holds, makes the columns of S from
    first_r on; out_ptr [N, R] is multiplied with the first R of them. Without in_ptr they are there
    already, without out_ptr (R = 0) there is no low-rank branch.
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
    IS_NESTED: tl.constexpr
    BLOCKSIZE: tl.constexpr
    BLOCKSIZE2: tl.constexpr
    SHARING: tl.constexpr


@triton.jit
def _place_of(
    ticket, M, N, num_chunks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Of a ticket: whether it produces, its BLOCK_S rows or BLOCK_M rows, its chunk or BLOCK_N
    columns.

    Groups of GROUP_M row blocks follow each other: their columns of W sit in the L2 cache, and so
    do the rows of X that its producers and its GEMM tiles read.
    """
    GROUP: tl.constexpr = GROUP_M * BLOCK_M
    columns = tl.cdiv(N, BLOCK_N)
    tickets = GROUP // BLOCK_S * num_chunks + GROUP_M * columns
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
        across += group * GROUP_M
    return produces, across, down


@triton.jit
def _take(
    produces, across, down, members, x_descs, w_descs, num_partials, s_ptr, largest_ptr, b_ptr,
    d_ptr, g_ptr, bias_ptr, y_ptr, v_ptr, spans_ptr, sync_ptr, keep_scale, seed_low, seed_high,
    threshold, M, N, num_chunks, rows_per_sample, stride_sm, stride_ym,
    IN_IS_B: tl.constexpr, HAS_b: tl.constexpr, HAS_d: tl.constexpr, HAS_g: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADAPTER: tl.constexpr, MAKES_S: tl.constexpr,
    HAS_SPANS: tl.constexpr, WRITES_Y: tl.constexpr, SAVES_V: tl.constexpr,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, MASK_PARTS: tl.constexpr,
    PRECISION: tl.constexpr, SHUFFLES: tl.constexpr, MMA_SYNC: tl.constexpr, PAIRS: tl.constexpr,
    SETTLES: tl.constexpr,
):  # fmt: skip
    """Produce S, or a tile of the output, at the place of the ticket."""
    if not WRITES_Y or (MAKES_S and produces):
        produce(
            across, down, members, num_partials, s_ptr, largest_ptr, b_ptr, d_ptr, g_ptr,
            spans_ptr, sync_ptr, keep_scale, seed_low, seed_high, threshold, M, rows_per_sample,
            stride_sm, IN_IS_B, HAS_b, HAS_d, HAS_g, HAS_SPANS, DROPOUT, PAIRS, SETTLES,
            BLOCK_M, BLOCK_K, BLOCK_R, BLOCK_S, PRECISION,
        )  # fmt: skip
    else:
        consume(
            across, down, members, x_descs, w_descs, num_partials, num_chunks, s_ptr, largest_ptr,
            b_ptr, d_ptr, g_ptr, bias_ptr, y_ptr, v_ptr, spans_ptr, sync_ptr, keep_scale, seed_low,
            seed_high, threshold, M, N, rows_per_sample, stride_sm, stride_ym,
            IN_IS_B, HAS_b, HAS_d, HAS_g, HAS_BIAS, HAS_ADAPTER, MAKES_S, HAS_SPANS, SAVES_V,
            DROPOUT, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_E, BLOCK_S, MASK_PARTS, PRECISION,
            SHUFFLES, MMA_SYNC,
        )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def ticketed_gemm(
    members, num_partials, s_ptr, largest_ptr, b_ptr, d_ptr, g_ptr, bias_ptr, y_ptr, v_ptr,
    spans_ptr, sync_ptr, keep_scale, seed_low, seed_high, threshold, M, N, num_chunks,
    rows_per_sample, stride_sm, stride_ym,
    x_desc_0, w_desc_0, x_desc_1, w_desc_1, x_desc_2, w_desc_2,
    IN_IS_B: tl.constexpr, HAS_b: tl.constexpr, HAS_d: tl.constexpr, HAS_g: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADAPTER: tl.constexpr, MAKES_S: tl.constexpr,
    HAS_SPANS: tl.constexpr, WRITES_Y: tl.constexpr, SAVES_V: tl.constexpr,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, GROUP_M: tl.constexpr, MASK_PARTS: tl.constexpr,
    PRECISION: tl.constexpr, SHUFFLES: tl.constexpr, MMA_SYNC: tl.constexpr, PAIRS: tl.constexpr,
    SETTLES: tl.constexpr,
):  # fmt: skip
    """One ticket: rows BLOCK_S × BLOCK_R of S, or a tile BLOCK_M × BLOCK_N of the output.

    IN_IS_B tells the two uses apart: False is the forward pass (in = A, out = B with its gains, g
    on the output), True the input gradient (in = B with its gains, out = A, g on X). Gains, V and
    spans are those of a launch with one member. x_desc_i and w_desc_i are tensor descriptors of
    member i's X and W, those of all members or none.
    """
    x_descs, w_descs = (x_desc_0, x_desc_1, x_desc_2), (w_desc_0, w_desc_1, w_desc_2)
    ticket = tl.program_id(0)
    if MAKES_S:
        ticket = tl.atomic_add(sync_ptr, 1, sem="relaxed")
    produces, across, down = _place_of(ticket, M, N, num_chunks, BLOCK_M, BLOCK_N, BLOCK_S, GROUP_M)
    _take(
        # In Triton 3.5 an argument's inner tuples forget their constants at an `if`; sums do not.
        produces, across, down, members + (), x_descs, w_descs, num_partials,  # noqa: RUF005
        s_ptr, largest_ptr, b_ptr, d_ptr, g_ptr, bias_ptr, y_ptr, v_ptr, spans_ptr, sync_ptr,
        keep_scale, seed_low, seed_high, threshold, M, N, num_chunks, rows_per_sample,
        stride_sm, stride_ym,
        IN_IS_B, HAS_b, HAS_d, HAS_g, HAS_BIAS, HAS_ADAPTER, MAKES_S, HAS_SPANS, WRITES_Y, SAVES_V,
        DROPOUT, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, BLOCK_E, BLOCK_S, MASK_PARTS,
        PRECISION, SHUFFLES, MMA_SYNC, PAIRS, SETTLES,
    )  # fmt: skip
    if MAKES_S:
        finished = tl.atomic_add(sync_ptr + 1, 1, sem="acq_rel")
        if finished == tl.num_programs(0) - 1:
            words = FLAGS + tl.cdiv(M, BLOCK_M)
            for first in range(0, words, 128):
                offs = first + tl.arange(0, 128)
                tl.store(sync_ptr + offs, tl.zeros([128], tl.int32), mask=offs < words)


def forward(
    x, weight, bias, A, B, b, d, g, scaling, dropout, rank_spans=None, *,
    saves_V=False, S=None, made=None, config=None,
):  # fmt: skip
    """y [M, N], S [M, R] (None without an adapter) and V [M, N] (None unless saved) in one launch.

    x [M, K], weight [N, K], rank_spans [samples, 2]; V is y before g and the bias. Layers that
    share x share a shrink: the first makes S of several A at once, A being their stack
    [R_made, K] and S [M, R_made] given as `made`, and uses its first columns, as many as B has; the
    others get their columns as S and make none.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    in_factor = None
    if A is not None and S is None:
        in_factor = A.T
        made = x.new_empty(x.shape[0], A.shape[0]) if made is None else made
        S = made[:, : B.shape[1]]
    V = torch.empty_like(y) if saves_V else None
    if config is None:
        # With g, V may be stored beside y.
        R = 0 if S is None else S.shape[1]
        config = pick_gemm(x.shape[0], x.dtype, current_arch(), narrow=g is not None, R=R)
    layer = (x, weight, None, in_factor, B, scaling)
    shrink = Shrunk(S)
    _launch(config, [layer], y, V, shrink, b, d, g, bias, dropout, rank_spans, is_grad=False)
    return y, S, V


def grad_input(
    dY, weight, partials, A, B, b, d, g, scaling, dropout, rank_spans=None, *,
    wants_dX, config=None,
):  # fmt: skip
    """dX [M, K] (None unless wanted) and dS, a Shrunk, in one launch, for dY [M, N] and
    weight [N, K].

    partials [J, M, R] are the parts of dS that the strips kernel left; with None this launch
    forms dS itself.
    """
    R = 0 if A is None else A.shape[0]
    # With g, W is scaled on its way.
    picks = {"narrow": g is not None, "masks": dropout.p > 0.0, "R": R}
    config = config or pick_gemm(dY.shape[0], dY.dtype, current_arch(), **picks)
    dX, dS = _results(wants_dX, dY, weight, R, config)
    layer = (dY, weight, partials, B, None if A is None else A.T, scaling)
    _launch(config, [layer], dX, None, dS, b, d, g, None, dropout, rank_spans, is_grad=True)
    return dX, dS


def grad_input_group(layers, dropout, *, wants_dX, config=None):
    """dX [M, K] = Σ dY_i W_i + drop'(dS_i A_i) (None unless wanted) and dS, a Shrunk with
    the dS_i side by side, in one launch.

    layers are (dY, weight, partials, A, B, scaling), all of them as in grad_input.
    """
    dY, weight = layers[0][:2]
    ranks = [A.shape[0] for *_, A, _, _ in layers]
    # One rank that is no multiple of 16 is enough.
    R = math.gcd(*ranks)
    config = config or pick_gemm(dY.shape[0], dY.dtype, current_arch(), masks=dropout.p > 0.0, R=R)
    dX, dS = _results(wants_dX, dY, weight, sum(ranks), config)
    layers = [(dY, w, partials, B, A.T, s) for dY, w, partials, A, B, s in layers]
    _launch(config, layers, dX, None, dS, None, None, None, None, dropout, None, is_grad=True)
    return dX, dS


def _results(wants_dX, dY, weight, R, config):
    dX = dY.new_empty(dY.shape[0], weight.shape[1]) if wants_dX else None
    return dX, new_gradient(dY, R, config.BLOCK_S) if R else Shrunk(None)


@drops_to_smaller
def _launch(config, layers, y, V, shrink, b, d, g, bias, dropout, spans, *, is_grad):
    """layers: (X, weight, partials, in_factor [K', R_made], out_factor [N', R], scaling); shrink: S
    without what scales it, or dS."""
    S = shrink.values
    members, parts, first_r, BLOCK_R, BLOCK_E = [], [], 0, 0, config.MAX_E
    even_K, packed = True, False
    x = layers[0][0]
    for layer in layers:
        member, partials = _member(*layer, first_r, config, is_grad), layer[2]
        members.append(member)
        parts.append(0 if partials is None else partials.shape[0])
        first_r += member.R_made
        BLOCK_R = max(BLOCK_R, rank_block(member.R_made))
        BLOCK_E = min(BLOCK_E, expand_block(member.R, x.dtype if S is None else S.dtype))
        even_K = even_K and member.K % config.BLOCK_K == 0
        packed = packed or member.IS_NF4.value
    BLOCK_R = min(BLOCK_R, config.MAX_R)
    M, N = x.shape[0], 0 if y is None else y.shape[1]
    makes_S = members[0].in_ptr is not None
    arch = current_arch()
    chunks = sum([-(-m.R_made // BLOCK_R) for m in members])
    blocks = -(-M // config.BLOCK_M)
    tickets = -(-M // config.BLOCK_S) * chunks + blocks * -(-N // config.BLOCK_N)
    if tickets == 0:
        return
    words = FLAGS.value + blocks
    seed_low, seed_high, threshold = dropout.words()
    descriptors = descriptors_of([(x, w) for x, w, *_ in layers], config, arch, is_grad)
    is_described = descriptors[0] is not None
    ticketed_gemm[(tickets,)](
        tuple(members), tuple(parts),
        S, shrink.largest, b, d, g, bias, y, V, spans,
        sync_words(x.device, words) if makes_S else None,
        dropout.keep_scale, seed_low, seed_high, threshold,
        M, N, chunks, M if spans is None else M // spans.shape[0],
        0 if S is None else S.stride(0), N, *descriptors,
        IN_IS_B=is_grad, HAS_b=b is not None, HAS_d=d is not None, HAS_g=g is not None,
        HAS_BIAS=bias is not None, HAS_ADAPTER=S is not None, MAKES_S=makes_S,
        HAS_SPANS=spans is not None, WRITES_Y=y is not None, SAVES_V=V is not None,
        DROPOUT=dropout.p > 0.0,
        EVEN_K=is_described or even_K,
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, BLOCK_R=BLOCK_R,
        BLOCK_E=BLOCK_E,
        BLOCK_S=config.BLOCK_S, GROUP_M=config.GROUP_M, MASK_PARTS=config.MASK_PARTS,
        PRECISION=precision_of(x.dtype),
        SHUFFLES=arch is not None, MMA_SYNC=uses_mma_sync(config, x.dtype, arch),
        PAIRS=drops_pairs(x.dtype, arch), SETTLES=settles_products(x.dtype, arch),
        num_warps=config.num_warps, num_stages=config.num_stages,
        # absmax = code2 · absmax2 + offset has to be rounded twice, as bitsandbytes does.
        enable_fp_fusion=not packed,
        **debug_options(),
    )  # fmt: skip


def _member(x, weight, partials, in_factor, out_factor, scaling, first_r, config, is_grad):
    pointers, w_strides, switches = weight_arguments(weight, config, is_grad)
    R = 0 if out_factor is None else out_factor.shape[1]
    R_made = 0 if in_factor is None else in_factor.shape[1]
    return Member(
        x, *pointers, partials, in_factor, out_factor, float(scaling),
        x.shape[1], R, R_made, first_r,
        *x.stride(), *w_strides, *_strides(in_factor), *_strides(out_factor),
        **{name: _constant(value) for name, value in switches.items()},
    )  # fmt: skip


# One object for each value: Triton compares the constants of a launch with those of earlier ones.
_constant = functools.lru_cache(maxsize=None, typed=True)(tl.constexpr)


def _strides(factor):
    return (0, 0) if factor is None else factor.stride()
