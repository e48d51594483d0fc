"""The tiles of ticketed_gemm that follow: Σ over members of X W', then S · outᵀ, then g and bias.

The K-loops over the weights run one after the other into the same accumulator, before the tile
waits for its row block's flag.
"""

import triton
import triton.language as tl

from .descriptors import MOST_LAYERS
from .dropout import keep_mask
from .nf4_codes import load_codes
from .nf4_tile import load_nf4_tile, packed_pointers
from .scaling import tile_scale
from .shrink_tiles import load_spans, times_gain
from .tiles import FLAGS, load_factor, load_tile, tile_pointers

# Rounds of waiting before a launch is aborted: each goes to the L2 cache and back, so it takes
# seconds, and what producers do takes less than a millisecond.
MOST_ROUNDS = tl.constexpr(1 << 24)
_STUCK = tl.constexpr(
    "lora_fast: parts of S that this tile needs are stored by nobody: words that thread blocks "
    "synchronise through were not zero before the launch (docs/kernels.md, Errors)"
)
_TRAP = tl.constexpr("{\n.reg .pred p;\nsetp.ne.b32 p, $1, 0;\n@p trap;\nmov.b32 $0, $1;\n}")


@triton.jit
def _add_product(
    acc, member, x_desc, w_desc, block_m, block_n, g_ptr, M, N,
    IN_IS_B: tl.constexpr, HAS_g: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    SHUFFLES: tl.constexpr, MMA_SYNC: tl.constexpr,
):  # fmt: skip
    """acc + X W' of one member: the K-loop over its weight, dense or packed.

    Descriptors fill what lies outside of their matrices with zeros, so they need no masks.
    """
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
        codes = load_codes(member.code_ptr, SHUFFLES)
        offset = tl.load(member.offset_ptr) if member.IS_NESTED else 0.0
        if IN_IS_B:
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
                w_ptrs, member.absmax_ptr, member.absmax2_ptr, member.code2_ptr, offset, codes,
                k if IN_IS_B else block_n, block_n if IN_IS_B else k,
                K if IN_IS_B else N, N if IN_IS_B else K,
                member.stride_wk if IN_IS_B else member.stride_wn,
                member.BLOCKSIZE, member.BLOCKSIZE2, member.IS_NESTED, member.SHARING,
                SHUFFLES, MMA_SYNC,
                EVEN_K and IN_IS_B, EVEN_K and not IN_IS_B, member.x_ptr.dtype.element_ty,
            )  # fmt: skip
            w = w if IN_IS_B else tl.trans(w)
        elif DESCRIBED:
            if IN_IS_B:
                w = w_desc.load([k * BLOCK_K, block_n * BLOCK_N])
            else:
                w = tl.trans(w_desc.load([block_n * BLOCK_N, k * BLOCK_K]))
        elif EVEN_K:
            w = tl.load(w_ptrs, mask=mask_n, other=0.0)
        else:
            w = tl.load(w_ptrs, mask=(offs_k < K - k * BLOCK_K)[:, None] & mask_n, other=0.0)
        if HAS_g and IN_IS_B:
            w = times_gain(w, g_ptr, k * BLOCK_K + offs_k, K)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += tl.cast(member.stride_xk, tl.int64) * BLOCK_K
        w_ptrs += w_step
    return acc


@triton.jit
def _wait_for_S(
    sync_ptr, block_m, num_chunks, M,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, TRAPS: tl.constexpr,
):  # fmt: skip
    """Acquire the flag of a row block, which counts its tiles of S that are stored.

    With TRAPS (PTX) the launch is aborted after MOST_ROUNDS. Not by tl.device_assert, which is for
    debugging: where a kernel calls anything, ptxas runs the wgmma of sm_90 one by one (C7510).
    """
    flag_ptr = sync_ptr + FLAGS + block_m
    expected = tl.cdiv(tl.minimum(BLOCK_M, M - block_m * BLOCK_M), BLOCK_S) * num_chunks
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
def _add_low_rank(
    acc, members, num_partials, block_m, offs_n, s_ptr, b_ptr, d_ptr, spans_ptr, u, M, N,
    rows_per_sample, stride_sm,
    IN_IS_B: tl.constexpr, HAS_b: tl.constexpr, HAS_d: tl.constexpr, HAS_SPANS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + u · Σ over members of S · outᵀ; u is None where S is an operand as it is."""
    dtype = members[0].x_ptr.dtype.element_ty
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    for i in tl.static_range(len(num_partials)):
        R = members[i].R
        first_r, stop_r = 0, R
        if HAS_SPANS:
            start, stop = load_spans(spans_ptr, offs_m, rows_per_sample, M, R)
            first_r = tl.min(start, 0) // BLOCK_E * BLOCK_E
            stop_r = tl.max(stop, 0)
        for r in tl.range(first_r, stop_r, BLOCK_E, num_stages=1):
            offs_r = r + tl.arange(0, BLOCK_E)
            S = load_tile(s_ptr + members[i].first_r, offs_m, offs_r, stride_sm, 1, M, R)
            factor = load_factor(
                members[i].out_ptr, b_ptr, d_ptr, members[i].scaling, offs_n, offs_r,
                members[i].stride_out_l, members[i].stride_out_r, N, R,
                not IN_IS_B, HAS_b, HAS_d, dtype,
            )  # fmt: skip
            if u is not None:
                S = (S * u).to(dtype)
            acc = tl.dot(S, tl.trans(factor), acc, input_precision=PRECISION)
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
    acc, members, num_partials, block_m, block_n, s_ptr, b_ptr, d_ptr, y_ptr, spans_ptr, u,
    keep_scale, seed_low, seed_high, threshold, M, N, rows_per_sample, stride_sm, stride_ym,
    IN_IS_B: tl.constexpr, HAS_b: tl.constexpr, HAS_d: tl.constexpr, HAS_SPANS: tl.constexpr,
    BLOCK_E: tl.constexpr, MASK_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    SHUFFLES: tl.constexpr,
):  # fmt: skip
    """acc + keep_scale · drop'(u · Σ over members of S · outᵀ), stored.

    What the mask drops needs an accumulator of its own: MASK_PARTS of the columns one after the
    other take the registers of one part.
    """
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1] // MASK_PARTS
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    parts = _column_parts(acc, MASK_PARTS)
    for i in tl.static_range(MASK_PARTS):
        first_n = (block_n * MASK_PARTS + i) * BLOCK_N
        offs_n = first_n + tl.arange(0, BLOCK_N)
        low_rank = _add_low_rank(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), members, num_partials, block_m, offs_n,
            s_ptr, b_ptr, d_ptr, spans_ptr, u, M, N, rows_per_sample, stride_sm,
            IN_IS_B, HAS_b, HAS_d, HAS_SPANS, BLOCK_M, BLOCK_E, PRECISION,
        )  # fmt: skip
        rows = offs_m
        if MASK_PARTS > 1 and SHUFFLES:
            # Or the compiler keeps what the parts have in common of their random words.
            rows = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [rows], tl.int32, False, 1)
        keep = keep_mask(seed_low, seed_high, threshold, rows, first_n, BLOCK_N)
        y = parts[i] + tl.where(keep, low_rank * tl.cast(keep_scale, tl.float32), 0.0)
        y_ptrs = tile_pointers(y_ptr, offs_m, offs_n, stride_ym, 1)
        inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def consume(
    block_m, block_n, members, x_descs, w_descs, num_partials, num_chunks, s_ptr, largest_ptr,
    b_ptr, d_ptr, g_ptr, bias_ptr, y_ptr, v_ptr, spans_ptr, sync_ptr, keep_scale, seed_low,
    seed_high, threshold, M, N, rows_per_sample, stride_sm, stride_ym,
    IN_IS_B: tl.constexpr, HAS_b: tl.constexpr, HAS_d: tl.constexpr, HAS_g: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADAPTER: tl.constexpr, MAKES_S: tl.constexpr,
    HAS_SPANS: tl.constexpr, SAVES_V: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr, MASK_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    SHUFFLES: tl.constexpr, MMA_SYNC: tl.constexpr, DESCRIPTORS: tl.constexpr = MOST_LAYERS,
):  # fmt: skip
    """One BLOCK_M × BLOCK_N tile of y."""
    # Dropout masks the low-rank part of dX alone.
    MASKS: tl.constexpr = DROPOUT and IN_IS_B and HAS_ADAPTER
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.static_range(len(num_partials)):  # more of them than descriptors have none
        acc = _add_product(
            acc, members[i], x_descs[i % DESCRIPTORS], w_descs[i % DESCRIPTORS],
            block_m, block_n, g_ptr, M, N, IN_IS_B, HAS_g, EVEN_K,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, SHUFFLES, MMA_SYNC,
        )  # fmt: skip
    if HAS_ADAPTER and MAKES_S:
        _wait_for_S(sync_ptr, block_m, num_chunks, M, BLOCK_M, BLOCK_S, SHUFFLES)
    u = None
    SCALES: tl.constexpr = HAS_ADAPTER and largest_ptr is not None
    if SCALES:
        first_m = block_m * BLOCK_M
        u, inverse = tile_scale(
            largest_ptr, first_m, tl.minimum(first_m + BLOCK_M, M), BLOCK_S, stride_sm
        )
        if MASKS:
            keep_scale = tl.cast(keep_scale, tl.float32) * inverse
        else:
            acc *= u
    if MASKS:
        _store_masked(
            acc, members, num_partials, block_m, block_n, s_ptr, b_ptr, d_ptr, y_ptr, spans_ptr, u,
            keep_scale, seed_low, seed_high, threshold, M, N, rows_per_sample, stride_sm,
            stride_ym, IN_IS_B, HAS_b, HAS_d, HAS_SPANS, BLOCK_E, MASK_PARTS, PRECISION, SHUFFLES,
        )  # fmt: skip
        return
    if HAS_ADAPTER:
        acc = _add_low_rank(
            acc, members, num_partials, block_m, offs_n, s_ptr, b_ptr, d_ptr, spans_ptr, u, M, N,
            rows_per_sample, stride_sm, IN_IS_B, HAS_b, HAS_d, HAS_SPANS, BLOCK_M, BLOCK_E,
            PRECISION,
        )  # fmt: skip
        if SCALES:
            acc *= inverse
    if SAVES_V:
        v_ptrs = tile_pointers(v_ptr, offs_m, offs_n, N, 1)
        tl.store(v_ptrs, acc.to(v_ptr.dtype.element_ty), mask=mask)
    if HAS_g and not IN_IS_B:
        acc *= tl.load(g_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = tile_pointers(y_ptr, offs_m, offs_n, stride_ym, 1)
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)
