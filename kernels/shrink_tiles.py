"""The tiles of ticketed_gemm that come first: S, or dS, for a few rows each.

    forward  S[M,R] = drop(x[M,K]) Aᵀ         dX  dS[M,R] = dY[M,N] (g ⊙ Q), or the sum of its parts

A launch with several members makes the S of all of them, side by side: every row block has a flag
that counts the tiles of S that are stored.
"""

import triton
import triton.language as tl

from .dropout import drop
from .scaling import largest_finite, scaled_columns
from .tiles import FLAGS, load_factor, load_tile, settled, sum_partials, tile_pointers


@triton.jit
def times_gain(tile, g_ptr, offs_k, K):
    """diag(g) · tile, for a tile [BLOCK_K, …], rounded once more."""
    gain = tl.load(g_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    return (tile.to(tl.float32) * gain[:, None]).to(tile.dtype)


@triton.jit
def load_spans(spans_ptr, offs_m, rows_per_sample, M, R):
    """Columns start ≤ r < stop of the rank that each row uses; (R, 0) for those that use none."""
    sample = offs_m // rows_per_sample
    start = tl.load(spans_ptr + 2 * sample, mask=offs_m < M, other=0)
    stop = tl.load(spans_ptr + 2 * sample + 1, mask=offs_m < M, other=0)
    used = start < stop
    return tl.where(used, start, R), tl.where(used, stop, 0)


@triton.jit
def _shrink_tile(
    member, b_ptr, d_ptr, g_ptr, keep_scale, seed_low, seed_high, threshold, offs_m, offs_r, M,
    IN_IS_B: tl.constexpr, HAS_b: tl.constexpr, HAS_d: tl.constexpr, HAS_g: tl.constexpr,
    DROPOUT: tl.constexpr, PAIRS: tl.constexpr, SETTLES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S[m, r] = X[m, :] · in[:, r] in float32, with dropout on X or g on the factor."""
    dtype = member.x_ptr.dtype.element_ty
    SCALES: tl.constexpr = IN_IS_B and dtype == tl.float16
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(0, tl.cdiv(member.K, BLOCK_K)):
        offs_k = k * BLOCK_K + tl.arange(0, BLOCK_K)
        x = load_tile(member.x_ptr, offs_m, offs_k, member.stride_xm, member.stride_xk, M, member.K)
        factor = load_factor(
            member.in_ptr, b_ptr, d_ptr, 1.0, offs_k, offs_r,
            member.stride_in_l, member.stride_in_r, member.K, member.R_made,
            IN_IS_B, HAS_b, HAS_d, tl.float32 if SCALES else dtype,
        )  # fmt: skip
        if DROPOUT:
            x = drop(x, seed_low, seed_high, threshold, offs_m, k * BLOCK_K, BLOCK_K, PAIRS)
        if HAS_g:
            factor = times_gain(factor, g_ptr, offs_k, member.K)
        if SCALES:
            operand, inverse = scaled_columns(factor, dtype)
            acc += tl.dot(x, operand, input_precision=PRECISION) * inverse
        else:
            acc = tl.dot(x, factor, acc, input_precision=PRECISION)
        if DROPOUT and SETTLES:
            acc = settled(acc)
    if DROPOUT:
        acc *= tl.cast(keep_scale, tl.float32)
    if IN_IS_B:
        acc *= tl.cast(member.scaling, tl.float32)
    return acc


@triton.jit
def _store_chunk(
    member, num_partials, first_r, tile, offs_m, s_ptr, largest_ptr, b_ptr, d_ptr, g_ptr,
    spans_ptr, keep_scale, seed_low, seed_high, threshold, M, rows_per_sample, stride_sm,
    IN_IS_B: tl.constexpr, HAS_b: tl.constexpr, HAS_d: tl.constexpr, HAS_g: tl.constexpr,
    HAS_SPANS: tl.constexpr, DROPOUT: tl.constexpr, PAIRS: tl.constexpr, SETTLES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store BLOCK_S × BLOCK_R of a member's S, from column first_r of it on, and the largest |S| of
    each column where it is to be scaled."""
    SUMS_PARTIALS: tl.constexpr = member.partials_ptr is not None
    R = member.R_made
    offs_r = first_r + tl.arange(0, BLOCK_R)
    wanted = True
    if HAS_SPANS:
        start, stop = load_spans(spans_ptr, offs_m, rows_per_sample, M, R)
        wanted = (tl.min(start, 0) < first_r + BLOCK_R) & (tl.max(stop, 0) > first_r)
    S = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    if wanted:
        if SUMS_PARTIALS:
            S = sum_partials(
                member.partials_ptr, num_partials, offs_m, offs_r, M, R, BLOCK_S, BLOCK_R
            )
        else:
            S = _shrink_tile(
                member, b_ptr, d_ptr, g_ptr, keep_scale, seed_low, seed_high, threshold,
                offs_m, offs_r, M, IN_IS_B, HAS_b, HAS_d, HAS_g and IN_IS_B,
                DROPOUT and not IN_IS_B, PAIRS, SETTLES, BLOCK_S, BLOCK_K, BLOCK_R, PRECISION,
            )  # fmt: skip
    if HAS_SPANS:
        columns = offs_r[None, :]
        S = tl.where((columns >= start[:, None]) & (columns < stop[:, None]), S, 0.0)
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    s_ptrs = tile_pointers(s_ptr + member.first_r, offs_m, offs_r, stride_sm, 1)
    tl.store(s_ptrs, S.to(s_ptr.dtype.element_ty), mask=mask)
    if largest_ptr is not None:
        largest_ptrs = largest_ptr + tl.cast(tile, tl.int64) * stride_sm + member.first_r + offs_r
        tl.store(largest_ptrs, largest_finite(S, 0), mask=offs_r < R)


@triton.jit
def produce(
    tile, chunk, members, num_partials, s_ptr, largest_ptr, b_ptr, d_ptr, g_ptr, spans_ptr,
    sync_ptr,
    keep_scale, seed_low, seed_high, threshold, M, rows_per_sample, stride_sm,
    IN_IS_B: tl.constexpr, HAS_b: tl.constexpr, HAS_d: tl.constexpr, HAS_g: tl.constexpr,
    HAS_SPANS: tl.constexpr, DROPOUT: tl.constexpr, PAIRS: tl.constexpr, SETTLES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store one chunk of the members' ranks for BLOCK_S rows, then raise their row block's flag."""
    offs_m = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    # Not len(members): Triton 3.6 fails on the length of a tuple that holds None.
    for i in tl.static_range(len(num_partials)):
        chunks = tl.cdiv(members[i].R_made, BLOCK_R)
        if (chunk >= 0) & (chunk < chunks):
            _store_chunk(
                members[i], num_partials[i], chunk * BLOCK_R, tile, offs_m, s_ptr, largest_ptr,
                b_ptr, d_ptr, g_ptr, spans_ptr, keep_scale, seed_low, seed_high, threshold, M,
                rows_per_sample, stride_sm, IN_IS_B, HAS_b, HAS_d, HAS_g, HAS_SPANS, DROPOUT,
                PAIRS, SETTLES, BLOCK_K, BLOCK_R, BLOCK_S, PRECISION,
            )  # fmt: skip
        chunk -= chunks
    # Every warp's part of S must be stored before one thread releases the flag.
    tl.debug_barrier()
    tl.atomic_add(sync_ptr + FLAGS + tile * BLOCK_S // BLOCK_M, 1, sem="release")
