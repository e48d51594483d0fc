"""S of all layers that read x, in one read of x, and on request beside a copy of x.

    S[M,R] = drop(x[M,K]) A[R,K]ᵀ          wide[M, K + P] = [x | S | 0]          P = R padded to 16

The A of several layers stay where they are: row r of A is found in the layer that r falls to.
A product of the wide rows with rows [W | Q | 0] is the whole of a layer with its low-rank part
(nf4_decode.augmented makes these). P columns more keep rows at multiples of 32 bytes.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .dropout import NO_DROPOUT, Words, drop, drops_pairs, seed_of
from .environment import current_arch, precision_of
from .launch_plans import empty, launch
from .launch_policy import pick_shrink, rank_block, settles_products
from .out_of_resources import OutOfResources, instead_of
from .profile import shown_as, shrink_name, shrink_work
from .shrink_tiles import Spans, load_rows, load_spans, rows_of
from .tiles import Matrix, Target, load_tile, settled, store_tile

# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = ("M", "rows_per_sample", "seed_low", "seed_high", "threshold")
_PAD = 16


class ShrinkTiles(NamedTuple):
    """A constant of a launch: rows, columns of x in one step, columns of S."""

    BLOCK_M: int
    BLOCK_K: int
    BLOCK_R: int


@triton.jit
def _shrink_rows(
    x_mat, A_rows, stride_ak, R, wide_mat, words, offs_m, offs_r, steps,
    DROPOUT: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """S [BLOCK_M, BLOCK_R] in float32; copies the rows of x on its way, if there is a wide_mat."""
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_K: tl.constexpr = TILES.BLOCK_K
    BLOCK_R: tl.constexpr = TILES.BLOCK_R
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if DROPOUT:
        seed = seed_of(words)
    for k in range(0, steps):
        offs_k = k * BLOCK_K + tl.arange(0, BLOCK_K)
        x = load_tile(x_mat, offs_m, offs_k)
        if wide_mat.ptr is not None:
            store_tile(wide_mat, x, offs_m, offs_k)
        A = load_rows(A_rows, offs_k, offs_r, stride_ak, x_mat.size_1, R).to(x.dtype)
        if DROPOUT:
            x = drop(x, words, seed, offs_m, k * BLOCK_K, BLOCK_K, TARGET.PAIRS)
        acc = tl.dot(x, A, acc, input_precision=TARGET.PRECISION)
        if DROPOUT and TARGET.SETTLES:
            acc = settled(acc)
    if DROPOUT:
        acc *= tl.cast(words.keep_scale, tl.float32)
    return acc


@triton.jit(do_not_specialize=_VARYING, **shown_as(shrink_name, shrink_work))
def shrink(
    x_ptr, factors, ranks, s_ptr, wide_ptr, spans_ptr, keep_scale, seed_ptr, seed_low, seed_high,
    threshold, M, K, R, padded, rows_per_sample, stride_xm, stride_xk, stride_ar, stride_ak,
    DROPOUT: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """A tile of rows and a chunk of the rank; those of the same rows follow each other, and the
    first chunk copies x."""
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_R: tl.constexpr = TILES.BLOCK_R
    chunks = tl.cdiv(R, BLOCK_R)
    first_r = tl.program_id(0) % chunks * BLOCK_R
    offs_m = tl.program_id(0) // chunks * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    copied = tl.where(first_r == 0, M, 0)
    steps = tl.cdiv(K, TILES.BLOCK_K)
    if spans_ptr is not None:
        start, stop = load_spans(Spans(spans_ptr, rows_per_sample), offs_m, M, R)
        wanted = (tl.min(start, 0) < first_r + BLOCK_R) & (tl.max(stop, 0) > first_r)
        if wide_ptr is not None:
            wanted = wanted | (first_r == 0)
        steps = tl.where(wanted, steps, 0)
    S = _shrink_rows(
        Matrix(x_ptr, stride_xm, stride_xk, M, K), rows_of(factors, ranks, offs_r, stride_ar),
        stride_ak, R, Matrix(wide_ptr, K + padded, 1, copied, K),
        Words(seed_ptr, seed_low, seed_high, threshold, keep_scale), offs_m, offs_r, steps,
        DROPOUT, TILES, TARGET,
    )  # fmt: skip
    if spans_ptr is not None:
        columns = offs_r[None, :]
        S = tl.where((columns >= start[:, None]) & (columns < stop[:, None]), S, 0.0)
    if s_ptr is not None:
        store_tile(Matrix(s_ptr, R, 1, M, R), S, offs_m, offs_r)
    if wide_ptr is not None:
        # Columns of S beyond R are zero: so are those of A.
        store_tile(Matrix(wide_ptr + K, K + padded, 1, M, padded), S, offs_m, offs_r)


def padding_of(R):
    """Columns that S takes beside x."""
    return -(-R // _PAD) * _PAD


def of_rows(x, factors, dropout=NO_DROPOUT, rank_spans=None):
    """S [M, R] for x [M, K] and the A [R_i, K] of every layer, of one dtype and equal strides; R is
    the sum of their ranks."""
    S = empty(x, x.shape[0], _rank_of(factors))
    _launch(None, x, factors, S, None, dropout, rank_spans)
    return S


def beside_rows(x, factors, dropout=NO_DROPOUT, rank_spans=None, *, saves_S):
    """wide [M, K + P], and S [M, R] for backward (None unless saved)."""
    (M, K), R = x.shape, _rank_of(factors)
    wide = empty(x, M, K + padding_of(R))
    S = empty(x, M, R) if saves_S else None
    _launch(None, x, factors, S, wide, dropout, rank_spans)
    return wide, S


def _rank_of(factors):
    return sum([A.shape[0] for A in factors])


def _launch(config, x, factors, S, wide, dropout, rank_spans):
    (M, K), R = x.shape, _rank_of(factors)
    arch = current_arch()
    config = config or pick_shrink(M, x.dtype)
    BLOCK_R = rank_block(R)
    if M == 0:
        return
    seed, seed_low, seed_high, threshold = dropout.words()
    try:
        launch(
            shrink, (-(-M // config.BLOCK_M) * -(-R // BLOCK_R),),
            x, tuple(factors), tuple([A.shape[0] for A in factors]), S, wide, rank_spans,
            dropout.keep_scale, seed, seed_low, seed_high, threshold,
            M, K, R, padding_of(R), M if rank_spans is None else M // rank_spans.shape[0],
            *x.stride(), *factors[0].stride(),
            DROPOUT=dropout.p > 0.0,
            TILES=ShrinkTiles(config.BLOCK_M, config.BLOCK_L, BLOCK_R),
            TARGET=Target(
                precision_of(x.dtype), drops_pairs(x.dtype, arch), settles_products(x.dtype, arch)
            ),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    except OutOfResources:
        _launch(instead_of(config), x, factors, S, wide, dropout, rank_spans)
