"""The consumer tiles of ticketed_gemm: Σ over members of X W', then S · outᵀ, then g and bias.

The K-loops over the weights run one after the other into the same accumulator, before the tile
waits for its row block's flag.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .descriptors import MOST_LAYERS
from .dropout import keep_mask, seed_of
from .nf4_codes import load_codes
from .nf4_tile import load_nf4_tile, packed_pointers
from .scaling import tile_scale
from .shrink_tiles import load_spans, times_gain
from .sync_layout import FLAGS, leave
from .tiles import (
    Matrix,
    in_units,
    load_factor,
    load_tile,
    load_vector,
    store_tile,
    tile_pointers,
)

# Rounds of waiting before a launch is aborted: each goes to the L2 cache and back, so it takes
# seconds, and what producers do takes less than a millisecond.
MOST_ROUNDS = tl.constexpr(1 << 24)
_STUCK = tl.constexpr(
    "lora_fast: parts of S that this tile needs are stored by nobody: words that thread blocks "
    "synchronise through were not zero before the launch (docs/kernels.md, Errors)"
)
_TRAP = tl.constexpr("{\n.reg .pred p;\nsetp.ne.b32 p, $1, 0;\n@p trap;\nmov.b32 $0, $1;\n}")


# The compiler does not see through it: what depends on the result is computed again.
_MOVE = tl.constexpr("mov.b32 $0, $1;")
_DESCRIBED = tl.constexpr(MOST_LAYERS)


class Output(NamedTuple):
    """y [M, N], V of the same shape or None, and the bias [N] or None; rows of y are whole."""

    y_ptr: Any
    v_ptr: Any
    bias_ptr: Any
    M: Any
    N: Any
    stride_ym: Any


@triton.jit
def _add_product(
    acc, member, x_desc, w_desc, block_m, block_n, g_ptr, M, N,
    IS_GRAD: tl.constexpr, EVEN_K: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """acc + X W' of one member: the K-loop over its weight, dense or packed.

    Descriptors fill what lies outside of their matrices with zeros, so they need no masks.
    """
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_N: tl.constexpr = TILES.BLOCK_N
    BLOCK_K: tl.constexpr = TILES.BLOCK_K
    K = member.K
    IS_NF4: tl.constexpr = member.IS_NF4
    DESCRIBED: tl.constexpr = x_desc is not None
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = (offs_m < M)[:, None]
    mask_n = (offs_n < N)[None, :]
    x_ptrs = tile_pointers(member.x_ptr, offs_m, offs_k, member.stride_xm, member.stride_xk)
    w_step = tl.cast(member.stride_wk, tl.int64) * BLOCK_K
    if not IS_NF4:
        w_ptrs = tile_pointers(member.w_ptr, offs_k, offs_n, member.stride_wk, member.stride_wn)
    else:
        codes = load_codes(member.code_ptr, TARGET.SHUFFLES)
        offset = tl.load(member.offset_ptr) if member.offset_ptr is not None else 0.0
        if IS_GRAD:
            w_ptrs = packed_pointers(member.w_ptr, 0, block_n, member.stride_wk, BLOCK_K, BLOCK_N)
        else:
            w_ptrs = packed_pointers(member.w_ptr, block_n, 0, member.stride_wn, BLOCK_N, BLOCK_K)
            w_step = BLOCK_K // 2
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        if DESCRIBED:
            x = x_desc.load([block_m * BLOCK_M, k * BLOCK_K])
        elif EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=mask_m & (offs_k < K - k * BLOCK_K)[None, :], other=0.0)
        if IS_NF4:
            # Rows and columns of the weight [N, K] as it lies in memory.
            w = load_nf4_tile(
                w_ptrs, member, offset, codes,
                k if IS_GRAD else block_n, block_n if IS_GRAD else k,
                K if IS_GRAD else N, N if IS_GRAD else K,
                member.stride_wk if IS_GRAD else member.stride_wn,
                EVEN_K and IS_GRAD, EVEN_K and not IS_GRAD, member.x_ptr.dtype.element_ty, TARGET,
            )  # fmt: skip
            w = w if IS_GRAD else tl.trans(w)
        elif DESCRIBED:
            if IS_GRAD:
                w = w_desc.load([k * BLOCK_K, block_n * BLOCK_N])
            else:
                w = tl.trans(w_desc.load([block_n * BLOCK_N, k * BLOCK_K]))
        elif EVEN_K:
            w = tl.load(w_ptrs, mask=mask_n, other=0.0)
        else:
            w = tl.load(w_ptrs, mask=(offs_k < K - k * BLOCK_K)[:, None] & mask_n, other=0.0)
        if g_ptr is not None and IS_GRAD:
            w = times_gain(w, g_ptr, k * BLOCK_K + offs_k, K)
        acc = tl.dot(x, w, acc, input_precision=TARGET.PRECISION)
        x_ptrs += tl.cast(member.stride_xk, tl.int64) * BLOCK_K
        w_ptrs += w_step
    return acc


@triton.jit
def _wait_for_S(sync_ptr, block_m, num_chunks, M, TILES: tl.constexpr, TRAPS: tl.constexpr):
    """Acquire the flag of a row block, which counts its tiles of S that are stored.

    With TRAPS (PTX) the launch is aborted after MOST_ROUNDS. Not by tl.device_assert, which is for
    debugging: where a kernel calls anything, ptxas runs the wgmma of sm_90 one by one (C7510).
    """
    flag_ptr = sync_ptr + FLAGS + block_m
    rows = tl.minimum(TILES.BLOCK_M, M - block_m * TILES.BLOCK_M)
    expected = tl.cdiv(rows, TILES.BLOCK_S) * num_chunks
    rounds = 0
    stored = tl.atomic_add(flag_ptr, 0, sem="acquire")
    while (stored < expected) & (rounds < MOST_ROUNDS):
        stored = tl.atomic_add(flag_ptr, 0, sem="acquire")
        if TRAPS:
            rounds += 1
    tl.device_assert(stored >= expected, _STUCK)
    if TRAPS:
        is_stuck = (stored < expected).to(tl.int32)
        tl.inline_asm_elementwise(_TRAP, "=r,r", [is_stuck], tl.int32, False, 1)


@triton.jit
def leaves_early(members, y_ptr, IS_GRAD: tl.constexpr, DROPOUT: tl.constexpr, TILES: tl.constexpr):
    """Whether consumers leave before they store their tile, which the count would wait for. In
    kernels that are short of registers, by a mask or decoding, and with small tiles, which are soon
    stored, all CTAs leave at their end."""
    is_small: tl.constexpr = TILES.BLOCK_M < 32
    masks: tl.constexpr = IS_GRAD and DROPOUT
    return y_ptr is not None and not is_small and not masks and not members[0].IS_NF4


@triton.jit
def _add_low_rank(
    acc, members, num_partials, offs_m, offs_n, shrunk, gains, spans, u, M, N,
    IS_GRAD: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """acc + u · Σ over members of S · outᵀ; u is None where S is an operand as it is."""
    BLOCK_E: tl.constexpr = TILES.BLOCK_E
    dtype = members[0].x_ptr.dtype.element_ty
    for i in tl.static_range(len(num_partials)):
        R = in_units(members[i].R, TILES.UNIT)
        first_r, stop_r = 0, R
        if spans.ptr is not None:
            start, stop = load_spans(spans, offs_m, M, R)
            first_r = tl.min(start, 0) // BLOCK_E * BLOCK_E
            stop_r = tl.max(stop, 0)
        S_ptr = shrunk.ptr + in_units(members[i].first_r, TILES.UNIT)
        s_mat = Matrix(S_ptr, in_units(shrunk.stride, TILES.UNIT), 1, M, R)
        stride_l = in_units(members[i].stride_out_l, 1 if IS_GRAD else TILES.FACTOR_UNIT)
        out_mat = Matrix(members[i].out_ptr, stride_l, members[i].stride_out_r, N, R)
        for r in tl.range(first_r, stop_r, BLOCK_E, num_stages=1):
            offs_r = r + tl.arange(0, BLOCK_E)
            S = load_tile(s_mat, offs_m, offs_r)
            factor = load_factor(
                out_mat, gains, members[i].scaling, offs_n, offs_r, not IS_GRAD, dtype
            )
            if u is not None:
                S = (S * u).to(dtype)
            acc = tl.dot(S, tl.trans(factor), acc, input_precision=TARGET.PRECISION)
    return acc


@triton.jit
def _column_parts(acc, PARTS: tl.constexpr):
    """The columns of acc in PARTS (1 or 4) tiles; every thread keeps what it has."""
    ROWS: tl.constexpr = acc.shape[0]
    HALF: tl.constexpr = acc.shape[1] // 2
    if PARTS == 1:
        return (acc,)
    else:
        tl.static_assert(PARTS == 4)
        left, right = tl.split(acc.reshape(ROWS, 2, HALF).permute(0, 2, 1))
        first, second = tl.split(left.reshape(ROWS, 2, HALF // 2).permute(0, 2, 1))
        third, fourth = tl.split(right.reshape(ROWS, 2, HALF // 2).permute(0, 2, 1))
        return first, second, third, fourth


@triton.jit
def _store_masked(
    acc, members, num_partials, block_m, block_n, shrunk, gains, out, spans, u, words, keep_scale,
    IS_GRAD: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """acc + keep_scale · drop'(u · Σ over members of S · outᵀ), stored.

    What the mask drops needs an accumulator of its own: MASK_PARTS of the columns one after the
    other take the registers of one part.
    """
    MASK_PARTS: tl.constexpr = TILES.MASK_PARTS
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_N: tl.constexpr = TILES.BLOCK_N // MASK_PARTS
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    parts = _column_parts(acc, MASK_PARTS)
    for i in tl.static_range(MASK_PARTS):
        first_n = (block_n * MASK_PARTS + i) * BLOCK_N
        offs_n = first_n + tl.arange(0, BLOCK_N)
        low_rank = _add_low_rank(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), members, num_partials, offs_m, offs_n,
            shrunk, gains, spans, u, out.M, out.N, IS_GRAD, TILES, TARGET,
        )  # fmt: skip
        rows = offs_m
        if MASK_PARTS > 1 and TARGET.SHUFFLES:
            # Or the compiler keeps what the parts have in common of their random words.
            rows = tl.inline_asm_elementwise(_MOVE, "=r,r", [rows], tl.int32, False, 1)
        keep = keep_mask(words, seed_of(words), rows, first_n, BLOCK_N)
        y = parts[i] + tl.where(keep, low_rank * tl.cast(keep_scale, tl.float32), 0.0)
        store_tile(Matrix(out.y_ptr, out.stride_ym, 1, out.M, out.N), y, offs_m, offs_n)


@triton.jit
def consume(
    block_m, block_n, members, x_descs, w_descs, num_partials, num_chunks, shrunk, gains, out,
    spans, words, sync_ptr,
    IS_GRAD: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, TILES: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """One BLOCK_M × BLOCK_N tile of y."""
    HAS_ADAPTER: tl.constexpr = shrunk.ptr is not None
    # Dropout masks the low-rank part of dX alone.
    MASKS_dX: tl.constexpr = DROPOUT and IS_GRAD and HAS_ADAPTER
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_N: tl.constexpr = TILES.BLOCK_N
    M, N = out.M, out.N
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.static_range(len(num_partials)):
        # A group of more layers than have descriptors is read by pointers.
        acc = _add_product(
            acc, members[i], x_descs[i] if i < _DESCRIBED else None,
            w_descs[i] if i < _DESCRIBED else None, block_m, block_n, gains.g, M, N,
            IS_GRAD, EVEN_K, TILES, TARGET,
        )  # fmt: skip
    if HAS_ADAPTER and sync_ptr is not None:
        _wait_for_S(sync_ptr, block_m, num_chunks, M, TILES, TARGET.SHUFFLES)
        if leaves_early(members, out.y_ptr, IS_GRAD, DROPOUT, TILES):
            leave(sync_ptr, tl.cdiv(M, BLOCK_M) * tl.cdiv(N, TILES.BLOCK_N), M, BLOCK_M, True)
        if len(num_partials) > 1 and not members[0].IS_NF4 and TARGET.SHUFFLES:
            # Kept through the K-loops of dense weights and the wait, rows would be spilled.
            block_m = tl.inline_asm_elementwise(_MOVE, "=r,r", [block_m], tl.int32, False, 1)
            offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    u, keep_scale = None, words.keep_scale
    SCALES: tl.constexpr = HAS_ADAPTER and shrunk.largest is not None
    if SCALES:
        first_m = block_m * BLOCK_M
        last_m = tl.minimum(first_m + BLOCK_M, M)
        u, inverse = tile_scale(shrunk.largest, first_m, last_m, TILES.BLOCK_S, shrunk.stride)
        if MASKS_dX:
            keep_scale = tl.cast(keep_scale, tl.float32) * inverse
        else:
            acc *= u
    if MASKS_dX:
        _store_masked(
            acc, members, num_partials, block_m, block_n, shrunk, gains, out, spans, u, words,
            keep_scale, IS_GRAD, TILES, TARGET,
        )  # fmt: skip
        return
    if HAS_ADAPTER:
        acc = _add_low_rank(
            acc, members, num_partials, offs_m, offs_n, shrunk, gains, spans, u, M, N,
            IS_GRAD, TILES, TARGET,
        )  # fmt: skip
        if SCALES:
            acc *= inverse
    if out.v_ptr is not None:
        store_tile(Matrix(out.v_ptr, N, 1, M, N), acc, offs_m, offs_n)
    if gains.g is not None and not IS_GRAD:
        acc *= load_vector(gains.g, offs_n, N)[None, :]
    if out.bias_ptr is not None:
        acc += load_vector(out.bias_ptr, offs_n, N)[None, :]
    store_tile(Matrix(out.y_ptr, out.stride_ym, 1, M, N), acc, offs_m, offs_n)
