"""The producer tiles of ticketed_gemm, which come first: S, or dS, for a few rows each.

    forward  S[M,R] = drop(x[M,K]) Aᵀ         dX  dS[M,R] = dY[M,N] (g ⊙ Q), or the sum of its parts

A launch with several members makes the S of all of them, side by side: every row block has a flag
that counts the tiles of S that are stored.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .dropout import drop, seed_of
from .scaling import largest_finite, scaled_columns
from .sync_layout import FLAGS
from .tiles import (
    Matrix,
    in_units,
    load_factor,
    load_tile,
    load_vector,
    settled,
    store_tile,
    sum_partials,
)


class ShrunkPointers(NamedTuple):
    """S or dS [M, ΣR] of all members, and the largest numbers of its tiles (scaling.Shrunk)."""

    ptr: Any
    largest: Any
    stride: Any


class Spans(NamedTuple):
    """Columns [start, stop) of the rank that each sample of so many rows uses: [samples, 2]."""

    ptr: Any
    rows_per_sample: Any


@triton.jit
def rows_of(factors, ranks, offs_r, stride_ar):
    """Pointers to the rows offs_r [BLOCK_R] of the A [R_i, K] of several layers, as if they lay one
    below the other; rows beyond the last are past its end."""
    ptrs = factors[0] + offs_r.to(tl.int64) * stride_ar
    first_r = ranks[0]
    # Not len(factors): Triton 3.6 fails on the length of a tuple that holds None.
    for i in tl.static_range(1, len(ranks)):
        later = factors[i] + (offs_r - first_r).to(tl.int64) * stride_ar
        ptrs = tl.where(offs_r < first_r, ptrs, later)
        first_r += ranks[i]
    return ptrs


@triton.jit
def load_rows(ptrs, offs_k, offs_r, stride_ak, K, R):
    """The tile [offs_k, offs_r] of Aᵀ, whose rows of A are at `ptrs`; zero outside of it."""
    mask = (offs_k < K)[:, None] & (offs_r < R)[None, :]
    offs = offs_k.to(tl.int64)[:, None] * stride_ak
    return tl.load(ptrs[None, :] + offs, mask=mask, other=0.0)


@triton.jit
def times_gain(tile, g_ptr, offs_k, K):
    """diag(g) · tile, for a tile [BLOCK_K, …], rounded once more."""
    return (tile.to(tl.float32) * load_vector(g_ptr, offs_k, K)[:, None]).to(tile.dtype)


@triton.jit
def load_spans(spans, offs_m, M, R):
    """Columns start ≤ r < stop of the rank that each row uses; (R, 0) for those that use none."""
    sample = offs_m // spans.rows_per_sample
    start = tl.load(spans.ptr + 2 * sample, mask=offs_m < M, other=0)
    stop = tl.load(spans.ptr + 2 * sample + 1, mask=offs_m < M, other=0)
    used = start < stop
    return tl.where(used, start, R), tl.where(used, stop, 0)


@triton.jit
def _shrink_tile(
    member, factors, ranks, gains, words, offs_m, offs_r, M,
    IS_GRAD: tl.constexpr, DROPOUT: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """S[m, r] = X[m, :] · in[:, r] in float32, with dropout on X or g on the factor; of several
    `factors`, column r is that of the layer which it falls to."""
    BLOCK_S: tl.constexpr = TILES.BLOCK_S
    BLOCK_K: tl.constexpr = TILES.BLOCK_K
    BLOCK_R: tl.constexpr = TILES.BLOCK_R
    dtype = member.x_ptr.dtype.element_ty
    SCALES: tl.constexpr = IS_GRAD and dtype == tl.float16
    x_mat = Matrix(member.x_ptr, member.stride_xm, member.stride_xk, M, member.K)
    R = in_units(member.R_made, TILES.UNIT)
    stride_l = in_units(member.stride_in_l, TILES.FACTOR_UNIT if IS_GRAD else 1)
    in_mat = Matrix(member.in_ptr, stride_l, member.stride_in_r, member.K, R)
    acc = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    if factors is not None:
        rows = rows_of(factors, ranks, offs_r, member.stride_in_r)
    if DROPOUT:
        seed = seed_of(words)
    for k in range(0, tl.cdiv(member.K, BLOCK_K)):
        offs_k = k * BLOCK_K + tl.arange(0, BLOCK_K)
        x = load_tile(x_mat, offs_m, offs_k)
        if factors is not None:
            factor = load_rows(rows, offs_k, offs_r, member.stride_in_l, member.K, R)
            factor = factor.to(dtype)
        else:
            factor = load_factor(
                in_mat, gains, 1.0, offs_k, offs_r, IS_GRAD, tl.float32 if SCALES else dtype
            )
        if DROPOUT:
            x = drop(x, words, seed, offs_m, k * BLOCK_K, BLOCK_K, TARGET.PAIRS)
        if IS_GRAD and gains.g is not None:
            factor = times_gain(factor, gains.g, offs_k, member.K)
        if SCALES:
            operand, inverse = scaled_columns(factor, dtype)
            acc += tl.dot(x, operand, input_precision=TARGET.PRECISION) * inverse
        else:
            acc = tl.dot(x, factor, acc, input_precision=TARGET.PRECISION)
        if DROPOUT and TARGET.SETTLES:
            acc = settled(acc)
    if DROPOUT:
        acc *= tl.cast(words.keep_scale, tl.float32)
    if IS_GRAD:
        acc *= tl.cast(member.scaling, tl.float32)
    return acc


@triton.jit
def _store_chunk(
    member, num_partials, factors, ranks, first_r, row_tile, offs_m, shrunk, gains, spans, words,
    M, IS_GRAD: tl.constexpr, DROPOUT: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Store BLOCK_S × BLOCK_R of a member's S, from column first_r of it on, and the largest |S| of
    each column where it is to be scaled."""
    SUMS_PARTIALS: tl.constexpr = member.partials_ptr is not None
    BLOCK_R: tl.constexpr = TILES.BLOCK_R
    BLOCK_S: tl.constexpr = TILES.BLOCK_S
    R = in_units(member.R_made, TILES.UNIT)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    wanted = True
    if spans.ptr is not None:
        start, stop = load_spans(spans, offs_m, M, R)
        wanted = (tl.min(start, 0) < first_r + BLOCK_R) & (tl.max(stop, 0) > first_r)
    S = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    if wanted:
        if SUMS_PARTIALS:
            S = sum_partials(
                member.partials_ptr, num_partials, offs_m, offs_r, M, R, BLOCK_S, BLOCK_R
            )
        else:
            S = _shrink_tile(
                member, factors, ranks, gains, words, offs_m, offs_r, M,
                IS_GRAD, DROPOUT and not IS_GRAD, TILES, TARGET,
            )  # fmt: skip
    if spans.ptr is not None:
        columns = offs_r[None, :]
        S = tl.where((columns >= start[:, None]) & (columns < stop[:, None]), S, 0.0)
    S_ptr = shrunk.ptr + in_units(member.first_r, TILES.UNIT)
    s_mat = Matrix(S_ptr, in_units(shrunk.stride, TILES.UNIT), 1, M, R)
    store_tile(s_mat, S, offs_m, offs_r)
    if shrunk.largest is not None:
        row = tl.cast(row_tile, tl.int64) * shrunk.stride
        largest_ptrs = shrunk.largest + row + member.first_r + offs_r
        tl.store(largest_ptrs, largest_finite(S, 0), mask=offs_r < R)


@triton.jit
def produce(
    row_tile, chunk, members, num_partials, factors, ranks, shrunk, gains, spans, words, sync_ptr,
    M, IS_GRAD: tl.constexpr, DROPOUT: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Store one chunk of the members' ranks for BLOCK_S rows, then raise their row block's flag."""
    offs_m = row_tile * TILES.BLOCK_S + tl.arange(0, TILES.BLOCK_S)
    # Not len(members): Triton 3.6 fails on the length of a tuple that holds None.
    for i in tl.static_range(len(num_partials)):
        chunks = tl.cdiv(members[i].R_made, TILES.BLOCK_R)
        if (chunk >= 0) & (chunk < chunks):
            _store_chunk(
                members[i], num_partials[i], factors, ranks, chunk * TILES.BLOCK_R, row_tile,
                offs_m, shrunk, gains, spans, words, M, IS_GRAD, DROPOUT, TILES, TARGET,
            )  # fmt: skip
        chunk -= chunks
    # Every warp's part of S must be stored before one thread releases the flag.
    tl.debug_barrier()
    block_m = row_tile * TILES.BLOCK_S // TILES.BLOCK_M
    tl.atomic_add(sync_ptr + FLAGS + block_m, 1, sem="release")
