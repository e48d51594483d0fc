"""One read of a tall matrix X [M, L] against the narrow S [M, R]: the gradients of both factors.

    grad_expand  X = dY [M, N], S = drop(x) Aᵀ     T = dVᵀ S = g ⊙ (dYᵀ S)               [N, R]
                 dB = s · b dᵀ ⊙ T                 db = s · rowsum(B ⊙ T dᵀ)
                 dd = s · colsum(b B ⊙ T)          dbias = Σ_M dY      dg = Σ_M dY ⊙ V
                 and, of the same tiles, partials of dS = dY (s · (g b) dᵀ ⊙ B)       [J, M, R]
    grad_shrink  X = drop(x) [M, K], S = dS        dA = dSᵀ drop(x)                       [R, K]

A CTA keeps BLOCK_L columns and one chunk of the rank in registers and walks down one range of rows,
so T never leaves it until the range ends. Ranges write partial sums; the CTA that arrives last at a
block of columns adds them in the order of the ranges. dS is summed over the blocks of columns by
the launch that needs it (ticketed_gemm), in their order. No float atomics: results are bitwise
reproducible.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .configs import (
    current_arch,
    pick_strips,
    precision_of,
    rank_block,
    row_ranges,
    settles_products,
)
from .dropout import Dropout, drop, drops_pairs
from .fitting import drops_to_smaller
from .scaling import Shrunk, column_scales, scaled_columns
from .tiles import load_factor, load_tile, settled, tile_pointers
from .workspace import sync_words

# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = ("M", "rows_per_range", "num_ranges", "seed_low", "seed_high", "threshold")


@triton.jit
def _column_sums(x, v_ptr, offs_m, offs_l, M, L, stride_vm, stride_vl, HAS_GAIN: tl.constexpr):
    """Σ_m x and, with a gain, Σ_m x ⊙ V, of one tile, in float32."""
    wide = x.to(tl.float32)
    sums = tl.sum(wide, axis=0)
    products = sums
    if HAS_GAIN:
        V = load_tile(v_ptr, offs_m, offs_l, stride_vm, stride_vl, M, L).to(tl.float32)
        products = tl.sum(wide * V, axis=0)
    return sums, products


@triton.jit
def _sum_ranges(ptr, num_ranges, range_stride, offs, mask):
    """Σ over ranges of one stored vector or tile, always in their order."""
    total = tl.load(ptr + offs, mask=mask, other=0.0)
    for i in range(1, num_ranges):
        total += tl.load(ptr + tl.cast(i, tl.int64) * range_stride + offs, mask=mask, other=0.0)
    return total


@triton.jit
def _walk_rows(
    x_ptr, s_ptr, largest_ptr, v_ptr, b_ptr, d_ptr, g_ptr, B_ptr, ds_ptr,
    scaling, keep_scale, seed_low, seed_high, threshold, first_m, last_m, first_l, first_r,
    tile_rows, M, L, R, stride_xm, stride_xl, stride_sm, stride_vm, stride_vl, stride_bl, stride_br,
    HAS_b: tl.constexpr, HAS_d: tl.constexpr, HAS_g: tl.constexpr,
    PROJECTS: tl.constexpr, OUTER: tl.constexpr, SUMS: tl.constexpr, GAIN_GRAD: tl.constexpr,
    DROPOUT: tl.constexpr, PAIRS: tl.constexpr, SETTLES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows [first_m, last_m): T [BLOCK_L, BLOCK_R], Σ x, Σ x ⊙ V; stores dS partials."""
    dtype = x_ptr.dtype.element_ty
    IS_FLOAT16: tl.constexpr = dtype == tl.float16
    offs_l = first_l + tl.arange(0, BLOCK_L)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    mask_l = offs_l < L
    T = tl.zeros([BLOCK_L, BLOCK_R], tl.float32)
    sums = tl.zeros([BLOCK_L], tl.float32)
    products = tl.zeros([BLOCK_L], tl.float32)
    if PROJECTS:
        factor = load_factor(
            B_ptr, b_ptr, d_ptr, 1.0, offs_l, offs_r, stride_bl, stride_br, L, R,
            True, HAS_b, HAS_d, tl.float32,
        )  # fmt: skip
        if HAS_g:
            factor *= tl.load(g_ptr + offs_l, mask=mask_l, other=0.0).to(tl.float32)[:, None]
        # Scaled by s after the product: s · B can be too small for float16, and so can B.
        product_scale = tl.cast(scaling, tl.float32)
        if IS_FLOAT16:
            factor, inverse = scaled_columns(factor, dtype)
            product_scale = product_scale * inverse
        else:
            factor = factor.to(dtype)
    if largest_ptr is not None:
        s_scale, s_inverse = column_scales(largest_ptr, first_m, last_m, tile_rows, offs_r, R)
    for m in range(first_m, last_m, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        x = load_tile(x_ptr, offs_m, offs_l, stride_xm, stride_xl, last_m, L)
        if DROPOUT:
            x = drop(x, seed_low, seed_high, threshold, offs_m, first_l, BLOCK_L, PAIRS)
        if OUTER:
            S = load_tile(s_ptr, offs_m, offs_r, stride_sm, 1, last_m, R)
            if largest_ptr is not None:
                S = (S * s_scale[None, :]).to(dtype)
            T = tl.dot(tl.trans(x), S, T, input_precision=PRECISION)
            if DROPOUT and SETTLES:
                T = settled(T)
        # After T: the conversion of dS, generic writes to shared memory, would stand between the
        # fence and T's products, and ptxas would run these one by one.
        if PROJECTS:
            dS = tl.dot(x, factor, input_precision=PRECISION) * product_scale
            mask = (offs_m < last_m)[:, None] & (offs_r < R)[None, :]
            tl.store(tile_pointers(ds_ptr, offs_m, offs_r, R, 1), dS, mask=mask)
        if SUMS:
            tile_sums, tile_products = _column_sums(
                x, v_ptr, offs_m, offs_l, last_m, L, stride_vm, stride_vl, GAIN_GRAD
            )
            sums += tile_sums
            products += tile_products
    if largest_ptr is not None:
        T *= s_inverse[None, :]
    if DROPOUT:
        T *= tl.cast(keep_scale, tl.float32)
    return T, sums, products


@triton.jit
def _store_factor_gradients(
    t_ptr, grad_ptr, B_ptr, b_ptr, d_ptr, g_ptr, db_ptr, dd_parts_ptr,
    scaling, offs_l, num_ranges, L, R, stride_gl, stride_gr, stride_bl, stride_br,
    HAS_b: tl.constexpr, HAS_d: tl.constexpr, HAS_g: tl.constexpr, SCALES: tl.constexpr,
    GRAD: tl.constexpr, GRAD_b: tl.constexpr, GRAD_d: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dB (or dA), db and this block's part of dd, from the partial T of every range."""
    # Narrow tiles: with a rank that is no multiple of 16 every element takes an address of its own.
    CHUNK: tl.constexpr = BLOCK_R if BLOCK_L * BLOCK_R <= 2048 else 16
    mask_l = offs_l < L
    db = tl.zeros([BLOCK_L], tl.float32)
    for r in tl.range(0, R, CHUNK, num_stages=1):
        offs_r = r + tl.arange(0, CHUNK)
        mask = mask_l[:, None] & (offs_r < R)[None, :]
        offs = offs_l.to(tl.int64)[:, None] * R + offs_r[None, :]
        T = _sum_ranges(t_ptr, num_ranges, tl.cast(L, tl.int64) * R, offs, mask)
        if SCALES:
            T *= tl.cast(scaling, tl.float32)
        if HAS_g:
            T *= tl.load(g_ptr + offs_l, mask=mask_l, other=0.0).to(tl.float32)[:, None]
        b = tl.full([BLOCK_L], 1.0, tl.float32)
        d = tl.full([CHUNK], 1.0, tl.float32)
        if HAS_b:
            b = tl.load(b_ptr + offs_l, mask=mask_l, other=0.0).to(tl.float32)
        if HAS_d:
            d = tl.load(d_ptr + offs_r, mask=offs_r < R, other=0.0).to(tl.float32)
        if GRAD_b or GRAD_d:
            B = load_tile(B_ptr, offs_l, offs_r, stride_bl, stride_br, L, R).to(tl.float32)
            db += tl.sum(B * T * d[None, :], axis=1)
            if GRAD_d:
                part = tl.sum(B * T * b[:, None], axis=0)
                block = tl.cast(tl.program_id(0), tl.int64)
                tl.store(dd_parts_ptr + block * R + offs_r, part, mask=offs_r < R)
        if GRAD:
            grad = (T * b[:, None] * d[None, :]).to(grad_ptr.dtype.element_ty)
            tl.store(tile_pointers(grad_ptr, offs_l, offs_r, stride_gl, stride_gr), grad, mask=mask)
    if GRAD_b:
        tl.store(db_ptr + offs_l, db.to(db_ptr.dtype.element_ty), mask=mask_l)


@triton.jit
def _store_column_gradients(
    sums_ptr, dbias_ptr, dg_ptr, offs_l, num_ranges, L,
    GRAD_BIAS: tl.constexpr, GRAD_g: tl.constexpr,
):  # fmt: skip
    """dbias and dg from the partial sums [2, ranges, L]."""
    mask = offs_l < L
    if GRAD_BIAS:
        dbias = _sum_ranges(sums_ptr, num_ranges, L, offs_l, mask)
        tl.store(dbias_ptr + offs_l, dbias.to(dbias_ptr.dtype.element_ty), mask=mask)
    if GRAD_g:
        products_ptr = sums_ptr + tl.cast(num_ranges, tl.int64) * L
        dg = _sum_ranges(products_ptr, num_ranges, L, offs_l, mask)
        tl.store(dg_ptr + offs_l, dg.to(dg_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def strips(
    x_ptr, s_ptr, largest_ptr, v_ptr, b_ptr, d_ptr, g_ptr, B_ptr,
    ds_ptr, t_ptr, sums_ptr, dd_parts_ptr, grad_ptr, db_ptr, dd_ptr, dbias_ptr, dg_ptr, sync_ptr,
    scaling, keep_scale, seed_low, seed_high, threshold, M, L, R, rows_per_range, num_ranges,
    tile_rows, stride_xm, stride_xl, stride_sm, stride_vm, stride_vl, stride_bl, stride_br,
    stride_gl, stride_gr,
    HAS_b: tl.constexpr, HAS_d: tl.constexpr, HAS_g: tl.constexpr,
    SCALES: tl.constexpr, PROJECTS: tl.constexpr, OUTER: tl.constexpr, GRAD: tl.constexpr,
    GRAD_b: tl.constexpr, GRAD_d: tl.constexpr, GRAD_g: tl.constexpr, GRAD_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, PAIRS: tl.constexpr, SETTLES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of columns, range of rows, chunk of the rank)."""
    block, rows, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    SUMS: tl.constexpr = GRAD_BIAS or GRAD_g
    first_m = rows * rows_per_range
    last_m = tl.minimum(first_m + rows_per_range, M)
    offs_l = block * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_r = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_l = offs_l < L
    T, sums, products = _walk_rows(
        x_ptr, s_ptr, largest_ptr, v_ptr, b_ptr, d_ptr, g_ptr, B_ptr,
        ds_ptr + tl.cast(block, tl.int64) * M * R if PROJECTS else ds_ptr,
        scaling, keep_scale, seed_low, seed_high, threshold,
        first_m, last_m, block * BLOCK_L, chunk * BLOCK_R, tile_rows, M, L, R,
        stride_xm, stride_xl, stride_sm, stride_vm, stride_vl, stride_bl, stride_br,
        HAS_b, HAS_d, HAS_g, PROJECTS, OUTER, SUMS, GRAD_g, DROPOUT, PAIRS,
        SETTLES, BLOCK_M, BLOCK_L, BLOCK_R, PRECISION,
    )  # fmt: skip
    if OUTER:
        t_rows = t_ptr + tl.cast(rows, tl.int64) * L * R
        mask = mask_l[:, None] & (offs_r < R)[None, :]
        tl.store(tile_pointers(t_rows, offs_l, offs_r, R, 1), T, mask=mask)
    if SUMS and chunk == 0:
        tl.store(sums_ptr + tl.cast(rows, tl.int64) * L + offs_l, sums, mask=mask_l)
        after = tl.cast(num_ranges + rows, tl.int64) * L
        tl.store(sums_ptr + after + offs_l, products, mask=mask_l)
    if OUTER or SUMS:
        # Every warp's partial sums must be stored before one thread counts this CTA as arrived.
        tl.debug_barrier()
        arrived = tl.atomic_add(sync_ptr + 1 + block, 1, sem="acq_rel")
        if arrived == num_ranges * tl.num_programs(2) - 1:
            tl.store(sync_ptr + 1 + block, 0)
            if OUTER:
                _store_factor_gradients(
                    t_ptr, grad_ptr, B_ptr, b_ptr, d_ptr, g_ptr, db_ptr, dd_parts_ptr,
                    scaling, offs_l, num_ranges, L, R, stride_gl, stride_gr, stride_bl, stride_br,
                    HAS_b, HAS_d, HAS_g, SCALES, GRAD, GRAD_b, GRAD_d, BLOCK_L, BLOCK_R,
                )  # fmt: skip
            if SUMS:
                _store_column_gradients(
                    sums_ptr, dbias_ptr, dg_ptr, offs_l, num_ranges, L, GRAD_BIAS, GRAD_g
                )
            if GRAD_d:
                tl.debug_barrier()
                blocks = tl.num_programs(0)
                if tl.atomic_add(sync_ptr, 1, sem="acq_rel") == blocks - 1:
                    tl.store(sync_ptr, 0)
                    for r in range(0, R, BLOCK_R):
                        offs = r + tl.arange(0, BLOCK_R)
                        dd = _sum_ranges(dd_parts_ptr, blocks, R, offs, offs < R)
                        tl.store(dd_ptr + offs, dd.to(dd_ptr.dtype.element_ty), mask=offs < R)


@dataclass(frozen=True)
class Wanted:
    """Which gradients of the output side a launch computes."""

    B: bool = False
    b: bool = False
    d: bool = False
    g: bool = False
    bias: bool = False

    @property
    def outer(self):
        return self.B or self.b or self.d

    @property
    def sums(self):
        return self.g or self.bias


def grad_expand(dY, S, V, bias, B, b, d, g, scaling, wanted, *, projects, config=None):
    """Every wanted gradient of the output side, in one read of dY [M, N].

    Returns the gradients as a dict by name (B, b, d, g, bias; in the dtype of the factor), and with
    `projects` the partials [J, M, R] of dS, one for each block of columns, else None.
    S [M, R] is needed for B, b and d; V [M, N] for g.
    """
    factors = {"B": B, "b": b, "d": d, "g": g, "bias": bias}
    grads = {
        name: dY.new_empty(factor.shape, dtype=factor.dtype)
        for name, factor in factors.items()
        if factor is not None and getattr(wanted, name)
    }
    R = 0 if B is None else B.shape[1]
    partials = _launch(
        config or pick_strips(dY.dtype, R, current_arch()),
        dY, Shrunk(S), V, B, b, d, g, grads, grads.get("B"), scaling, Dropout(),
        R=R, wanted=wanted, projects=projects, scales=True,
    )  # fmt: skip
    return grads, partials


def projection_pays(N, R, dtype, config=None):
    """Whether writing and reading partials of dS costs less than a second read of dY [M, N]."""
    config = config or pick_strips(dtype, R, current_arch())
    blocks = -(-N // config.BLOCK_L)
    return 2 * 4 * blocks * R <= N * dtype.itemsize


def grad_shrink(x, dS, dtype, dropout, config=None):
    """dA [R, K] in `dtype`, in one read of x [M, K], for dS, a Shrunk."""
    R = dS.values.shape[1]
    dA = x.new_empty((R, x.shape[1]), dtype=dtype)
    _launch(
        config or pick_strips(x.dtype, R, current_arch()),
        x, dS, None, None, None, None, None, {}, dA.T, 1.0, dropout,
        R=R, wanted=Wanted(B=True), projects=False, scales=False,
    )  # fmt: skip
    return dA


@drops_to_smaller
def _launch(
    config, x, shrink, V, B, b, d, g, grads, grad, scaling, dropout, *, R, wanted, projects, scales
):  # fmt: skip
    (M, L), S = x.shape, shrink.values
    arch = current_arch()
    BLOCK_R = rank_block(R)
    blocks = -(-L // config.BLOCK_L)
    chunks = -(-R // BLOCK_R) if wanted.outer or projects else 1
    ranges, rows_per_range = row_ranges(M, blocks * chunks, config.BLOCK_M)
    float32 = {"dtype": torch.float32}
    partials = x.new_empty((blocks, M, R), **float32) if projects else None
    T = x.new_empty((ranges, L, R), **float32) if wanted.outer else None
    sums = x.new_empty((2, ranges, L), **float32) if wanted.sums else None
    dd_parts = x.new_empty((blocks, R), **float32) if wanted.d else None
    if blocks == 0:
        return partials
    seed_low, seed_high, threshold = dropout.words()
    strips[(blocks, ranges, chunks)](
        x, S, shrink.largest, V, b, d, g, B, partials, T, sums, dd_parts,
        grad, grads.get("b"), grads.get("d"), grads.get("bias"), grads.get("g"),
        sync_words(x.device, 1 + blocks),
        float(scaling), dropout.keep_scale, seed_low, seed_high, threshold,
        M, L, R, rows_per_range, ranges, shrink.tile_rows,
        *x.stride(), 0 if S is None else S.stride(0), *_strides(V), *_strides(B), *_strides(grad),
        HAS_b=b is not None, HAS_d=d is not None, HAS_g=g is not None,
        SCALES=scales, PROJECTS=projects, OUTER=wanted.outer, GRAD=grad is not None,
        GRAD_b=wanted.b, GRAD_d=wanted.d, GRAD_g=wanted.g, GRAD_BIAS=wanted.bias,
        DROPOUT=dropout.p > 0.0, PAIRS=drops_pairs(x.dtype, arch),
        SETTLES=settles_products(x.dtype, arch),
        BLOCK_M=config.BLOCK_M, BLOCK_L=config.BLOCK_L, BLOCK_R=BLOCK_R,
        PRECISION=precision_of(x.dtype), num_warps=config.num_warps, enable_fp_fusion=True,
        # A pipelined tile that is summed and multiplied loses its wait: Triton 3.7.1 lets cp.async
        # overwrite on sm_90 what the previous iteration's wgmma still reads.
        num_stages=1 if wanted.sums else config.num_stages,
    )  # fmt: skip
    return partials


def _strides(matrix):
    return (0, 0) if matrix is None else matrix.stride()
