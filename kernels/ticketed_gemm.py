"""One launch for a linear layer with a low-rank branch: the forward pass and the input gradient.

    forward  y[M,N]  = g ⊙ (x[M,K] W[N,K]ᵀ + S[M,R] Qᵀ) + bias     S = drop(x) Aᵀ
    dX       dX[M,K] = dY[M,N] (g ⊙ W[N,K]) + drop'(dS[M,R] A)     dS = dY (g ⊙ Q), or its parts
    with     Q[N,R]  = s · b dᵀ ⊙ B

Both are out[M, N'] = X[M, K'] W' + S · outᵀ with the letters exchanged, so one kernel serves both.
Layers that read the same x share the work on it: the first makes S for all of them, the others
find their columns of it, and each adds its dX to that of the one before.

Its tiles are handed out by an atomic ticket. The first tickets produce S for a few rows each (the
shrink, or the sum of the partials that the strips kernel left), store it and release a flag per row
block. All later tickets are ordinary GEMM tiles: their whole K-loop runs first, then they acquire
the flag of their row block, add S · outᵀ to the same accumulator and store the tile once. A
producer waits for nobody and tickets are taken in start order, so there is no schedule in which it
deadlocks.

sync holds int32 zeros [ticket, finished, flag of row block 0, 1, …]; the CTA that finishes last
leaves zeros behind.
"""

import torch
import triton
import triton.language as tl

from .configs import (
    current_arch,
    expand_block,
    pick_gemm,
    precision_of,
    rank_block,
    uses_mma_sync,
)
from .dropout import keep_mask
from .fitting import drops_to_smaller
from .nf4_tile import load_codes, load_nf4_tile, packed_pointers, weight_arguments
from .tiles import group_rows, load_factor, load_tile, sum_partials, tile_pointers
from .workspace import sync_words

# Words of sync before the first flag: the ticket and the count of finished CTAs.
FLAGS = 2
# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = (
    "M", "num_partials", "num_producers", "num_tiles", "rows_per_sample", "seed_low", "seed_high",
    "threshold",
)  # fmt: skip


@triton.jit
def _shrink_tile(
    x_ptr, in_ptr, b_ptr, d_ptr, g_ptr, scaling, keep_scale, seed_low, seed_high, threshold,
    offs_m, offs_r, M, K, R, stride_xm, stride_xk, stride_in_l, stride_in_r,
    IN_IS_B: tl.constexpr, HAS_b: tl.constexpr, HAS_d: tl.constexpr, HAS_g: tl.constexpr,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """S[m, r] = X[m, :] · in[:, r] in float32, with dropout on X or g on the factor."""
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        offs_k = k * BLOCK_K + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, offs_m, offs_k, stride_xm, stride_xk, M, K)
        factor = load_factor(
            in_ptr, b_ptr, d_ptr, 1.0, offs_k, offs_r, stride_in_l, stride_in_r, K, R,
            IN_IS_B, HAS_b, HAS_d, dtype,
        )  # fmt: skip
        if DROPOUT:
            x = tl.where(
                keep_mask(seed_low, seed_high, threshold, offs_m, k * BLOCK_K, BLOCK_K), x, 0.0
            )
        if HAS_g:
            factor = _times_gain(factor, g_ptr, offs_k, K)
        acc = tl.dot(x, factor, acc, input_precision=PRECISION)
    if DROPOUT:
        acc *= tl.cast(keep_scale, tl.float32)
    if IN_IS_B:
        acc *= tl.cast(scaling, tl.float32)
    return acc


@triton.jit
def _times_gain(tile, g_ptr, offs_k, K):
    """diag(g) · tile, for a tile [BLOCK_K, …], rounded once more."""
    gain = tl.load(g_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    return (tile.to(tl.float32) * gain[:, None]).to(tile.dtype)


@triton.jit
def _load_spans(spans_ptr, offs_m, rows_per_sample, M, R):
    """Columns start ≤ r < stop of the rank that each row uses; (R, 0) for those that use none."""
    sample = offs_m // rows_per_sample
    start = tl.load(spans_ptr + 2 * sample, mask=offs_m < M, other=0)
    stop = tl.load(spans_ptr + 2 * sample + 1, mask=offs_m < M, other=0)
    used = start < stop
    return tl.where(used, start, R), tl.where(used, stop, 0)


@triton.jit
def _produce(
    ticket, x_ptr, s_ptr, partials_ptr, in_ptr, b_ptr, d_ptr, g_ptr, spans_ptr, sync_ptr,
    scaling, keep_scale, seed_low, seed_high, threshold, M, K, R, num_partials, rows_per_sample,
    stride_xm, stride_xk, stride_in_l, stride_in_r, stride_sm,
    IN_IS_B: tl.constexpr, HAS_b: tl.constexpr, HAS_d: tl.constexpr, HAS_g: tl.constexpr,
    HAS_SPANS: tl.constexpr, SUMS_PARTIALS: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store BLOCK_S × BLOCK_R of S, then raise the flag of its row block."""
    chunks = tl.cdiv(R, BLOCK_R)
    strip = ticket // chunks
    offs_m = strip * BLOCK_S + tl.arange(0, BLOCK_S)
    first_r = (ticket % chunks) * BLOCK_R
    offs_r = first_r + tl.arange(0, BLOCK_R)
    wanted = True
    if HAS_SPANS:
        start, stop = _load_spans(spans_ptr, offs_m, rows_per_sample, M, R)
        wanted = (tl.min(start, 0) < first_r + BLOCK_R) & (tl.max(stop, 0) > first_r)
    S = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    if wanted:
        if SUMS_PARTIALS:
            S = sum_partials(partials_ptr, num_partials, offs_m, offs_r, M, R, BLOCK_S, BLOCK_R)
        else:
            S = _shrink_tile(
                x_ptr, in_ptr, b_ptr, d_ptr, g_ptr, scaling, keep_scale, seed_low, seed_high,
                threshold, offs_m, offs_r, M, K, R, stride_xm, stride_xk, stride_in_l, stride_in_r,
                IN_IS_B, HAS_b, HAS_d, HAS_g and IN_IS_B, DROPOUT and not IN_IS_B,
                BLOCK_S, BLOCK_K, BLOCK_R, PRECISION,
            )  # fmt: skip
    if HAS_SPANS:
        columns = offs_r[None, :]
        S = tl.where((columns >= start[:, None]) & (columns < stop[:, None]), S, 0.0)
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    s_ptrs = tile_pointers(s_ptr, offs_m, offs_r, stride_sm, 1)
    tl.store(s_ptrs, S.to(s_ptr.dtype.element_ty), mask=mask)
    # Every warp's part of S must be stored before one thread releases the flag.
    tl.debug_barrier()
    tl.atomic_add(sync_ptr + 2 + strip * BLOCK_S // BLOCK_M, 1, sem="release")


@triton.jit
def _consume(
    tile, x_ptr, w_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr,
    s_ptr, out_ptr, b_ptr, d_ptr, g_ptr, bias_ptr, y_ptr, v_ptr, spans_ptr, sync_ptr,
    scaling, keep_scale, seed_low, seed_high, threshold, M, N, K, R, R_made, rows_per_sample,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_out_l, stride_out_r, stride_sm, stride_ym,
    IN_IS_B: tl.constexpr, HAS_b: tl.constexpr, HAS_d: tl.constexpr, HAS_g: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADAPTER: tl.constexpr, MAKES_S: tl.constexpr,
    HAS_SPANS: tl.constexpr, SAVES_V: tl.constexpr, ADDS: tl.constexpr, DROPOUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
    IS_NF4: tl.constexpr, IS_NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr, SHARING: tl.constexpr, SHUFFLES: tl.constexpr, MMA_SYNC: tl.constexpr,
):  # fmt: skip
    """One BLOCK_M × BLOCK_N tile: the K-loop over W, then S · outᵀ, then g and the bias."""
    block_m, block_n = group_rows(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = (offs_m < M)[:, None]
    mask_n = (offs_n < N)[None, :]
    x_ptrs = tile_pointers(x_ptr, offs_m, offs_k, stride_xm, stride_xk)
    w_step = tl.cast(stride_wk, tl.int64) * BLOCK_K
    if not IS_NF4:
        w_ptrs = tile_pointers(w_ptr, offs_k, offs_n, stride_wk, stride_wn)
    else:
        codes = load_codes(code_ptr, SHUFFLES)
        offset = tl.load(offset_ptr) if IS_NESTED else 0.0
        if IN_IS_B:
            w_ptrs = packed_pointers(w_ptr, 0, block_n, stride_wk, BLOCK_K, BLOCK_N)
        else:
            w_ptrs = packed_pointers(w_ptr, block_n, 0, stride_wn, BLOCK_N, BLOCK_K)
            w_step = BLOCK_K // 2
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if ADDS:
        # Before the loop: after it, the accumulator and what is added would both need registers.
        acc = load_tile(y_ptr, offs_m, offs_n, stride_ym, 1, M, N).to(tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=mask_m & (offs_k < K - k * BLOCK_K)[None, :], other=0.0)
        if IS_NF4:
            # Rows and columns of the weight [N, K] as it lies in memory.
            w = load_nf4_tile(
                w_ptrs, absmax_ptr, absmax2_ptr, code2_ptr, offset, codes,
                k if IN_IS_B else block_n, block_n if IN_IS_B else k,
                K if IN_IS_B else N, N if IN_IS_B else K, stride_wk if IN_IS_B else stride_wn,
                BLOCKSIZE, BLOCKSIZE2, IS_NESTED, SHARING, SHUFFLES, MMA_SYNC,
                EVEN_K and IN_IS_B, EVEN_K and not IN_IS_B, x_ptr.dtype.element_ty,
            )  # fmt: skip
            w = w if IN_IS_B else tl.trans(w)
        elif EVEN_K:
            w = tl.load(w_ptrs, mask=mask_n, other=0.0)
        else:
            w = tl.load(w_ptrs, mask=(offs_k < K - k * BLOCK_K)[:, None] & mask_n, other=0.0)
        if HAS_g and IN_IS_B:
            w = _times_gain(w, g_ptr, k * BLOCK_K + offs_k, K)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += tl.cast(stride_xk, tl.int64) * BLOCK_K
        w_ptrs += w_step
    if MAKES_S:
        rows = tl.minimum(BLOCK_M, M - block_m * BLOCK_M)
        expected = tl.cdiv(rows, BLOCK_S) * tl.cdiv(R_made, BLOCK_R)
        while tl.atomic_add(sync_ptr + 2 + block_m, 0, sem="acquire") < expected:
            pass
    if HAS_ADAPTER:
        # Dropout masks the low-rank part of dX alone, which then needs an accumulator of its own.
        low_rank = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) if DROPOUT and IN_IS_B else acc
        first_r, stop_r = 0, R
        if HAS_SPANS:
            start, stop = _load_spans(spans_ptr, offs_m, rows_per_sample, M, R)
            first_r = tl.min(start, 0) // BLOCK_E * BLOCK_E
            stop_r = tl.max(stop, 0)
        for r in tl.range(first_r, stop_r, BLOCK_E, num_stages=1):
            offs_r = r + tl.arange(0, BLOCK_E)
            S = load_tile(s_ptr, offs_m, offs_r, stride_sm, 1, M, R)
            factor = load_factor(
                out_ptr, b_ptr, d_ptr, scaling, offs_n, offs_r, stride_out_l, stride_out_r, N, R,
                not IN_IS_B, HAS_b, HAS_d, x_ptr.dtype.element_ty,
            )  # fmt: skip
            low_rank = tl.dot(S, tl.trans(factor), low_rank, input_precision=PRECISION)
        if DROPOUT and IN_IS_B:
            keep = keep_mask(seed_low, seed_high, threshold, offs_m, block_n * BLOCK_N, BLOCK_N)
            acc += tl.where(keep, low_rank * tl.cast(keep_scale, tl.float32), 0.0)
        else:
            acc = low_rank
    if SAVES_V:
        v_ptrs = tile_pointers(v_ptr, offs_m, offs_n, N, 1)
        tl.store(v_ptrs, acc.to(v_ptr.dtype.element_ty), mask=mask_m & mask_n)
    if HAS_g and not IN_IS_B:
        acc *= tl.load(g_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = tile_pointers(y_ptr, offs_m, offs_n, stride_ym, 1)
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)


@triton.jit(do_not_specialize=_VARYING)
def ticketed_gemm(
    x_ptr, w_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr,
    s_ptr, partials_ptr, in_ptr, out_ptr, b_ptr, d_ptr, g_ptr, bias_ptr,
    y_ptr, v_ptr, spans_ptr, sync_ptr,
    scaling, keep_scale, seed_low, seed_high, threshold,
    M, N, K, R, R_made, num_partials, num_producers, num_tiles, rows_per_sample,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_in_l, stride_in_r,
    stride_out_l, stride_out_r, stride_sm, stride_ym,
    IN_IS_B: tl.constexpr, HAS_b: tl.constexpr, HAS_d: tl.constexpr, HAS_g: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADAPTER: tl.constexpr, MAKES_S: tl.constexpr,
    HAS_SPANS: tl.constexpr, WRITES_Y: tl.constexpr, SAVES_V: tl.constexpr, ADDS: tl.constexpr,
    SUMS_PARTIALS: tl.constexpr,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
    IS_NF4: tl.constexpr, IS_NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr, SHARING: tl.constexpr, SHUFFLES: tl.constexpr, MMA_SYNC: tl.constexpr,
):  # fmt: skip
    """One ticket: rows BLOCK_S × BLOCK_R of S, or a tile BLOCK_M × BLOCK_N of the output.

    IN_IS_B tells the two uses apart: False is the forward pass (in = A, out = B with its gains, g
    on the output), True the input gradient (in = B with its gains, out = A, g on X).
    """
    ticket = tl.program_id(0)
    if MAKES_S:
        ticket = tl.atomic_add(sync_ptr, 1, sem="relaxed")
    if not WRITES_Y or (MAKES_S and ticket < num_producers):
        _produce(
            ticket, x_ptr, s_ptr, partials_ptr, in_ptr, b_ptr, d_ptr, g_ptr, spans_ptr, sync_ptr,
            scaling, keep_scale, seed_low, seed_high, threshold, M, K, R_made, num_partials,
            rows_per_sample, stride_xm, stride_xk, stride_in_l, stride_in_r, stride_sm,
            IN_IS_B, HAS_b, HAS_d, HAS_g, HAS_SPANS, SUMS_PARTIALS, DROPOUT,
            BLOCK_M, BLOCK_K, BLOCK_R, BLOCK_S, PRECISION,
        )  # fmt: skip
    else:
        _consume(
            ticket - num_producers, x_ptr, w_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr,
            code_ptr, s_ptr, out_ptr, b_ptr, d_ptr, g_ptr, bias_ptr,
            y_ptr, v_ptr, spans_ptr, sync_ptr,
            scaling, keep_scale, seed_low, seed_high, threshold, M, N, K, R, R_made,
            rows_per_sample, stride_xm, stride_xk, stride_wk, stride_wn, stride_out_l, stride_out_r,
            stride_sm, stride_ym, IN_IS_B, HAS_b, HAS_d, HAS_g, HAS_BIAS, HAS_ADAPTER, MAKES_S,
            HAS_SPANS, SAVES_V, ADDS, DROPOUT, EVEN_K,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, BLOCK_E, BLOCK_S, GROUP_M, PRECISION,
            IS_NF4, IS_NESTED, BLOCKSIZE, BLOCKSIZE2, SHARING, SHUFFLES, MMA_SYNC,
        )  # fmt: skip
    if MAKES_S:
        finished = tl.atomic_add(sync_ptr + 1, 1, sem="acq_rel")
        if finished == num_tiles - 1:
            words = 2 + tl.cdiv(M, BLOCK_M)
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
    # With g, V may be stored beside y.
    config = config or pick_gemm(x.shape[0], x.dtype, current_arch(), narrow=g is not None)
    y = x.new_empty(x.shape[0], weight.shape[0])
    in_factor = None
    if A is not None and S is None:
        in_factor = A.T
        made = x.new_empty(x.shape[0], A.shape[0]) if made is None else made
        S = made[:, : B.shape[1]]
    V = torch.empty_like(y) if saves_V else None
    _launch(
        config, x, weight, y, V, S, None, in_factor, B, b, d, g, bias, scaling, dropout, rank_spans,
        is_grad=False,
    )  # fmt: skip
    return y, S, V


def grad_input(
    dY, weight, partials, A, B, b, d, g, scaling, dropout, rank_spans=None, *,
    wants_dX, dS=None, add_to=None, config=None,
):  # fmt: skip
    """dX [M, K] (None unless wanted) and dS [M, R] in one launch, for dY [M, N] and weight [N, K].

    partials [J, M, R] are the parts of dS that the strips kernel left; with None this launch
    forms dS itself. dS may be given as columns of a wider matrix; dX is added to `add_to`, in
    place, where that is given.
    """
    # A second accumulator; or with g, W scaled on its way.
    narrow = dropout.p > 0.0 or g is not None
    config = config or pick_gemm(dY.shape[0], dY.dtype, current_arch(), narrow=narrow)
    dX = add_to
    if wants_dX and dX is None:
        dX = dY.new_empty(dY.shape[0], weight.shape[1])
    if A is not None and dS is None:
        dS = dY.new_empty(dY.shape[0], A.shape[0])
    out_factor = None if A is None else A.T
    _launch(
        config, dY, weight, dX, None, dS, partials, B, out_factor, b, d, g, None, scaling, dropout,
        rank_spans, is_grad=True, adds=add_to is not None,
    )  # fmt: skip
    return dX, dS


@drops_to_smaller
def _launch(
    config, x, w, y, V, S, partials, in_factor, out_factor, b, d, g, bias, scaling, dropout, spans,
    *, is_grad, adds=False,
):  # fmt: skip
    """w, as [K', N'] or its transpose; in_factor [K', R_made] (None: S is there already),
    out_factor [N', R]."""
    (M, K), N = x.shape, w.shape[1 if is_grad else 0]
    R, R_made = (0 if f is None else f.shape[1] for f in (S, in_factor))
    arch = current_arch()
    BLOCK_R = min(rank_block(R_made), config.MAX_R)
    producers = triton.cdiv(M, config.BLOCK_S) * triton.cdiv(R_made, BLOCK_R)
    tiles = 0 if y is None else triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N)
    if producers + tiles == 0:
        return
    words = FLAGS + triton.cdiv(M, config.BLOCK_M)
    sync = None if in_factor is None else sync_words(x.device, words)
    seed_low, seed_high, threshold = dropout.words()
    w_pointers, w_strides, switches = weight_arguments(w, config, is_grad)
    ticketed_gemm[(producers + tiles,)](
        x, *w_pointers, S, partials, in_factor, out_factor, b, d, g, bias, y, V, spans, sync,
        float(scaling), dropout.keep_scale, seed_low, seed_high, threshold,
        M, N, K, R, R_made, 0 if partials is None else partials.shape[0],
        producers, producers + tiles, M if spans is None else M // spans.shape[0],
        *x.stride(), *w_strides, *_strides(in_factor), *_strides(out_factor),
        0 if S is None else S.stride(0), N,
        IN_IS_B=is_grad, HAS_b=b is not None, HAS_d=d is not None, HAS_g=g is not None,
        HAS_BIAS=bias is not None, HAS_ADAPTER=S is not None, MAKES_S=in_factor is not None,
        HAS_SPANS=spans is not None, WRITES_Y=y is not None,
        SAVES_V=V is not None, ADDS=adds, SUMS_PARTIALS=partials is not None,
        DROPOUT=dropout.p > 0.0,
        EVEN_K=K % config.BLOCK_K == 0, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K, BLOCK_R=BLOCK_R, BLOCK_E=expand_block(R, x.dtype),
        BLOCK_S=config.BLOCK_S, GROUP_M=config.GROUP_M, PRECISION=precision_of(x.dtype),
        **switches, SHUFFLES=arch is not None, MMA_SYNC=uses_mma_sync(config, x.dtype, arch),
        num_warps=config.num_warps, num_stages=config.num_stages,
        # absmax = code2 · absmax2 + offset has to be rounded twice, as bitsandbytes does.
        enable_fp_fusion=not switches["IS_NF4"],
    )  # fmt: skip


def _strides(factor):
    return (0, 0) if factor is None else factor.stride()
