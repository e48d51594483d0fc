"""One read of a tall matrix X [M, L] against the narrow S [M, R]: the gradients of both factors.

    grad_expand  X = dY [M, N], S = drop(x) Aᵀ     T = dVᵀ S = g ⊙ (dYᵀ S)               [N, R]
                 dB = s · b dᵀ ⊙ T                 db = s · rowsum(B ⊙ T dᵀ)
                 dd = s · colsum(b B ⊙ T)          dbias = Σ_M dY      dg = Σ_M dY ⊙ V
                 and, of the same tiles, partials of dS = dY (s · (g b) dᵀ ⊙ B)       [J, M, R]
    grad_shrink  X = drop(x) [M, K], S = dS        dA = dSᵀ drop(x)                       [R, K]

Layers of equal ranks may share a launch of the first, in which their blocks of columns follow each
other.

A CTA keeps BLOCK_L columns and one chunk of the rank in registers and walks down one range of rows,
so T never leaves it until the range ends. Ranges write partial sums; the CTA that arrives last at a
block of columns adds them in the order of the ranges. dS is summed over the blocks of columns by
the launch that needs it (ticketed_gemm), in their order. No float atomics: results are bitwise
reproducible.
"""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .dropout import NO_DROPOUT, Words, drops_pairs
from .environment import current_arch, precision_of
from .launch_plans import empty, launch
from .launch_policy import (
    pick_strips,
    rank_block,
    row_ranges,
    settles_products,
)
from .out_of_resources import OutOfResources, instead_of
from .profile import shown_as, strips_name, strips_work
from .scaling import Shrunk
from .strip_tiles import Side, StripTiles, side_of, walk_rows
from .sync_layout import ARRIVALS, BLOCKS
from .tiles import (
    NO_GAINS,
    Matrix,
    Target,
    factor_unit,
    in_units,
    load_tile,
    load_vector,
    store_tile,
    unit_of,
)
from .workspace import sync_words

# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = ("M", "rows_per_range", "num_ranges", "seed_low", "seed_high", "threshold")


class Partials(NamedTuple):
    """What the CTAs leave to the last of them, or None: T [ranges, L, R], Σ x and Σ x ⊙ V
    [2, ranges, L] and dd [blocks, R]; dS [blocks, M, R] is for ticketed_gemm. All are float32."""

    dS: Any = None
    T: Any = None
    sums: Any = None
    dd: Any = None


class Results(NamedTuple):
    """The results, or None: of the factor [L, R], B or Aᵀ, and of b, d, the bias and g."""

    factor: Any = None
    b: Any = None
    d: Any = None
    bias: Any = None
    g: Any = None


@triton.jit
def _sum_ranges(ptr, num_ranges, range_stride, offs, mask):
    """Σ over ranges of one stored vector or tile, always in their order."""
    total = tl.load(ptr + offs, mask=mask, other=0.0)
    for i in range(1, num_ranges):
        total += tl.load(ptr + tl.cast(i, tl.int64) * range_stride + offs, mask=mask, other=0.0)
    return total


@triton.jit
def _store_factor_gradients(
    partials, grads, grad_mat, B_mat, gains, scaling, offs_l, num_ranges, columns,
    IS_EXPAND: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dB (or dA), db and this block's part of dd, from the partial T of every range."""
    # Narrow tiles: with an odd rank every element takes an address of its own.
    BLOCK_L: tl.constexpr = TILES.BLOCK_L
    CHUNK: tl.constexpr = TILES.BLOCK_R if BLOCK_L * TILES.BLOCK_R <= 2048 else 16
    L, R = B_mat.size_0, B_mat.size_1
    mask_l = offs_l < L
    db = tl.zeros([BLOCK_L], tl.float32)
    for r in tl.range(0, R, CHUNK, num_stages=1):
        offs_r = r + tl.arange(0, CHUNK)
        mask = mask_l[:, None] & (offs_r < R)[None, :]
        offs = offs_l.to(tl.int64)[:, None] * R + offs_r[None, :]
        T = _sum_ranges(partials.T, num_ranges, tl.cast(columns, tl.int64) * R, offs, mask)
        if IS_EXPAND:
            T *= tl.cast(scaling, tl.float32)
        if gains.g is not None:
            T *= load_vector(gains.g, offs_l, L)[:, None]
        b = tl.full([BLOCK_L], 1.0, tl.float32)
        d = tl.full([CHUNK], 1.0, tl.float32)
        if gains.b is not None:
            b = load_vector(gains.b, offs_l, L)
        if gains.d is not None:
            d = load_vector(gains.d, offs_r, R)
        if grads.b is not None or grads.d is not None:
            B = load_tile(B_mat, offs_l, offs_r).to(tl.float32)
            db += tl.sum(B * T * d[None, :], axis=1)
            if grads.d is not None:
                part = tl.sum(B * T * b[:, None], axis=0)
                block = tl.cast(tl.program_id(0), tl.int64)
                tl.store(partials.dd + block * R + offs_r, part, mask=offs_r < R)
        if grads.factor is not None:
            store_tile(grad_mat, T * b[:, None] * d[None, :], offs_l, offs_r)
    if grads.b is not None:
        tl.store(grads.b + offs_l, db.to(grads.b.dtype.element_ty), mask=mask_l)


@triton.jit
def _store_column_gradients(sums_ptr, grads, offs_l, num_ranges, columns, L):
    """dbias and dg from the partial sums [2, ranges, columns]."""
    mask = offs_l < L
    if grads.bias is not None:
        dbias = _sum_ranges(sums_ptr, num_ranges, columns, offs_l, mask)
        tl.store(grads.bias + offs_l, dbias.to(grads.bias.dtype.element_ty), mask=mask)
    if grads.g is not None:
        products_ptr = sums_ptr + tl.cast(num_ranges, tl.int64) * columns
        dg = _sum_ranges(products_ptr, num_ranges, columns, offs_l, mask)
        tl.store(grads.g + offs_l, dg.to(grads.g.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_VARYING, **shown_as(strips_name, strips_work))
def strips(
    x_ptr, s_ptr, largest_ptr, v_ptr, gains, B_ptr, partials, grads, others, widths, sync_ptr,
    scaling, keep_scale, seed_ptr, seed_low, seed_high, threshold, M, L, R, rows_per_range,
    num_ranges, tile_rows, stride_xm, stride_xl, stride_sm, stride_vm, stride_vl, stride_bl,
    stride_br, stride_gl, stride_gr,
    IS_EXPAND: tl.constexpr, DROPOUT: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Program (block of columns, range of rows, chunk of the rank).

    IS_EXPAND: S is scaled and has B's gains, as in grad_expand. What is not wanted is None in
    partials and grads: T for factor, b and d; the sums for bias and g. others are the layers after
    the first, or None, of widths L; gains, V, dd and the strides of B are those of all layers, and
    all S are side by side.
    """
    NEEDS_T: tl.constexpr = partials.T is not None
    SUMS: tl.constexpr = partials.sums is not None
    R, stride_sm = in_units(R, TILES.UNIT), in_units(stride_sm, TILES.UNIT)
    stride_bl = in_units(stride_bl, TILES.FACTOR_UNIT)
    stride_gl = in_units(stride_gl, TILES.FACTOR_UNIT)
    block, range_index, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_l, columns = block * TILES.BLOCK_L, L
    if widths is not None:
        # Before 3.7, Triton has no functions that return None, in a tuple neither.
        if grads.bias is None:
            side = Side(x_ptr, B_ptr, grads.factor, x_ptr, scaling, L, stride_xm, 0, 0, 0)
            side = side_of(block, side, others, widths, M)
            grads = Results(side.factor_ptr, None, None, None, None)
        else:
            side = Side(x_ptr, B_ptr, grads.factor, grads.bias, scaling, L, stride_xm, 0, 0, 0)
            side = side_of(block, side, others, widths, M)
            grads = Results(side.factor_ptr, None, None, side.bias_ptr, None)
        x_ptr, B_ptr, scaling, stride_xm = side.x_ptr, side.B_ptr, side.scaling, side.stride_xm
        s_ptr += in_units(side.first_r, TILES.UNIT)
        T_ptr, sums_ptr = partials.T, partials.sums
        T_ptr += tl.cast(side.first_l, tl.int64) * R
        if SUMS:
            sums_ptr += side.first_l
        partials = Partials(partials.dS, T_ptr, sums_ptr, None)
        first_l, L = (block - side.first_block) * TILES.BLOCK_L, side.L
        for i in tl.static_range(len(widths)):
            columns += widths[i]
    first_m = range_index * rows_per_range
    last_m = tl.minimum(first_m + rows_per_range, M)
    offs_l = first_l + tl.arange(0, TILES.BLOCK_L)
    offs_r = chunk * TILES.BLOCK_R + tl.arange(0, TILES.BLOCK_R)
    mask_l = offs_l < L
    B_mat = Matrix(B_ptr, stride_bl, stride_br, L, R)
    dS_ptr = partials.dS
    if dS_ptr is not None:
        dS_ptr += tl.cast(block, tl.int64) * M * R
    T, sums, products = walk_rows(
        Matrix(x_ptr, stride_xm, stride_xl, last_m, L), Matrix(s_ptr, stride_sm, 1, last_m, R),
        Matrix(v_ptr, stride_vm, stride_vl, last_m, L), B_mat, Matrix(dS_ptr, R, 1, last_m, R),
        largest_ptr, gains, scaling, Words(seed_ptr, seed_low, seed_high, threshold, keep_scale),
        first_m, first_l, chunk * TILES.BLOCK_R, tile_rows,
        NEEDS_T, SUMS, grads.g is not None, DROPOUT, TILES, TARGET,
    )  # fmt: skip
    if NEEDS_T:
        t_rows = partials.T + tl.cast(range_index, tl.int64) * columns * R
        store_tile(Matrix(t_rows, R, 1, L, R), T, offs_l, offs_r)
    if SUMS and chunk == 0:
        before = tl.cast(range_index, tl.int64) * columns
        tl.store(partials.sums + before + offs_l, sums, mask=mask_l)
        after = tl.cast(num_ranges + range_index, tl.int64) * columns
        tl.store(partials.sums + after + offs_l, products, mask=mask_l)
    if NEEDS_T or SUMS:
        # Every warp's partial sums must be stored before one thread counts this CTA as arrived.
        tl.debug_barrier()
        arrived = tl.atomic_add(sync_ptr + ARRIVALS + block, 1, sem="acq_rel")
        if arrived == num_ranges * tl.num_programs(2) - 1:
            tl.store(sync_ptr + ARRIVALS + block, 0)
            if NEEDS_T:
                _store_factor_gradients(
                    partials, grads, Matrix(grads.factor, stride_gl, stride_gr, L, R), B_mat, gains,
                    scaling, offs_l, num_ranges, columns, IS_EXPAND, TILES,
                )  # fmt: skip
            if SUMS:
                _store_column_gradients(partials.sums, grads, offs_l, num_ranges, columns, L)
            if grads.d is not None:
                tl.debug_barrier()
                blocks = tl.num_programs(0)
                if tl.atomic_add(sync_ptr + BLOCKS, 1, sem="acq_rel") == blocks - 1:
                    tl.store(sync_ptr + BLOCKS, 0)
                    for r in range(0, R, TILES.BLOCK_R):
                        offs = r + tl.arange(0, TILES.BLOCK_R)
                        dd = _sum_ranges(partials.dd, blocks, R, offs, offs < R)
                        tl.store(grads.d + offs, dd.to(grads.d.dtype.element_ty), mask=offs < R)


@dataclass(frozen=True)
class Wanted:
    """Which gradients of the output side a launch computes."""

    B: bool = False
    b: bool = False
    d: bool = False
    g: bool = False
    bias: bool = False

    @property
    def needs_T(self):
        return self.B or self.b or self.d

    @property
    def sums(self):
        return self.g or self.bias


def grad_expand(
    dY, B=None, scaling=1.0, *, wanted, S=None, V=None, bias=None, gains=NO_GAINS, stores_dS=False,
    config=None,
):  # fmt: skip
    """Every wanted gradient of the output side, in one read of dY [M, N].

    Returns the gradients as a dict by name (B, b, d, g, bias; in the dtype of the factor), and with
    `stores_dS` the partials [J, M, R] of dS, one for each block of columns, else None.
    S [M, R] is needed for B, b and d; V [M, N] for g.
    """
    factors = {"B": B, "b": gains.b, "d": gains.d, "g": gains.g, "bias": bias}
    found = {
        name: empty(dY, *factor.shape, dtype=factor.dtype)
        for name, factor in factors.items()
        if factor is not None and getattr(wanted, name)
    }
    R = 0 if B is None else B.shape[1]
    grads = Results(*(found.get(name) for name in ("B", "b", "d", "bias", "g")))
    (dS,) = _launch(
        config or pick_strips(dY.dtype, R, current_arch()), dY, Shrunk(S), grads, R, V=V, B=B,
        gains=gains, scaling=scaling, wanted=wanted, stores_dS=stores_dS, is_expand=True,
    )  # fmt: skip
    return found, dS


class Layer(NamedTuple):
    """What a launcher is given of a layer of a group: dY [M, N], B [N, R] and its s, the bias."""

    dY: Any
    B: Any
    scaling: float = 1.0
    bias: Any = None


def grad_expand_group(layers, S, *, wanted, stores_dS=False):
    """:func:`grad_expand` of several layers in one launch, one pair for each: for B and the bias
    alone, of B of equal ranks, dtypes and strides, dY whose columns are equally far apart, and S
    [M, ΣR]."""
    dY, B = layers[0].dY, layers[0].B
    R, found, sides, first_r, first_l = B.shape[1], [], [], 0, 0
    for layer in layers:
        L = layer.dY.shape[1]
        grads = {"B": empty(dY, L, R, dtype=B.dtype)}
        if wanted.bias:
            grads["bias"] = empty(dY, L, dtype=layer.bias.dtype)
        found.append(grads)
        sides.append(
            Side(layer.dY, layer.B, grads["B"], grads.get("bias"), float(layer.scaling), L,
                 layer.dY.stride(0), first_r, first_l, 0)
        )  # fmt: skip
        first_r, first_l = first_r + R, first_l + L
    results = Results(factor=sides[0].factor_ptr, bias=sides[0].bias_ptr)
    dS = _launch(
        pick_strips(dY.dtype, R, current_arch()), dY, Shrunk(S), results, R, B=B,
        scaling=layers[0].scaling, wanted=wanted, stores_dS=stores_dS, is_expand=True,
        others=sides[1:],
    )  # fmt: skip
    return list(zip(found, dS, strict=True))


def storing_dS_pays(N, R, dtype, config=None):
    """Whether writing and reading partials of dS costs less than a second read of dY [M, N]."""
    config = config or pick_strips(dtype, R, current_arch())
    blocks = -(-N // config.BLOCK_L)
    return 2 * 4 * blocks * R <= N * dtype.itemsize


def grad_shrink(x, dS, dtype, dropout=NO_DROPOUT, config=None):
    """dA [R, K] in `dtype`, in one read of x [M, K], for dS, a Shrunk."""
    R = dS.values.shape[1]
    dA = empty(x, R, x.shape[1], dtype=dtype)
    config = config or pick_strips(x.dtype, R, current_arch())
    _launch(config, x, dS, Results(factor=dA.T), R, dropout=dropout, wanted=Wanted(B=True))
    return dA


def _launch(
    config, x, shrunk, grads, R, *, wanted, V=None, B=None, gains=NO_GAINS, scaling=1.0,
    dropout=NO_DROPOUT, stores_dS=False, is_expand=False, others=(),
):  # fmt: skip
    """The partials of dS of every layer, or None; others: the layers after the first, without their
    first blocks."""
    (M, L), S = x.shape, shrunk.values
    widths = tuple([side.L for side in others])
    columns = L + sum(widths)
    arch = current_arch()
    BLOCK_R = rank_block(R)
    ends = list(itertools.accumulate(-(-width // config.BLOCK_L) for width in (L, *widths)))
    blocks = ends[-1]
    chunks = -(-R // BLOCK_R) if wanted.needs_T or stores_dS else 1
    ranges, rows_per_range = row_ranges(M, blocks * chunks, config.BLOCK_M, arch)
    float32 = {"dtype": torch.float32}
    partials = Partials(
        dS=empty(x, blocks, M, R, **float32) if stores_dS else None,
        T=empty(x, ranges, columns, R, **float32) if wanted.needs_T else None,
        sums=empty(x, 2, ranges, columns, **float32) if wanted.sums else None,
        dd=empty(x, blocks, R, **float32) if wanted.d else None,
    )
    starts = [0, *ends[:-1]]
    parts = [partials.dS] if not others or partials.dS is None else []
    parts = parts * (1 + len(others)) or [
        partials.dS[start:end] for start, end in zip(starts, ends, strict=True)
    ]
    if blocks == 0:
        return parts
    sides = [
        side._replace(first_block=start) for side, start in zip(others, starts[1:], strict=True)
    ]
    seed, seed_low, seed_high, threshold = dropout.words()
    try:
        launch(
            strips, (blocks, ranges, chunks),
            x, S, shrunk.largest, V, gains, B, partials, grads, tuple(sides) or None,
            widths or None,
            sync_words(x.device, ARRIVALS.value + blocks),
            float(scaling), dropout.keep_scale, seed, seed_low, seed_high, threshold,
            M, L, R, rows_per_range, ranges, shrunk.tile_rows,
            *x.stride(), 0 if S is None else S.stride(0), *_strides(V), *_strides(B),
            *_strides(grads.factor),
            IS_EXPAND=is_expand, DROPOUT=dropout.p > 0.0,
            TILES=StripTiles(
                config.BLOCK_M, config.BLOCK_L, BLOCK_R, unit_of(R, *_strides(S)[:1]),
                factor_unit(*[factor for factor in (B, grads.factor) if factor is not None]),
            ),
            TARGET=Target(
                precision_of(x.dtype), drops_pairs(x.dtype, arch), settles_products(x.dtype, arch)
            ),
            num_warps=config.num_warps, enable_fp_fusion=True,
            # A pipelined tile that is summed and multiplied loses its wait: Triton 3.7.1 lets
            # cp.async overwrite on sm_90 what the previous iteration's wgmma still reads.
            num_stages=1 if wanted.sums else config.num_stages,
        )  # fmt: skip
    except OutOfResources:
        return _launch(
            instead_of(config), x, shrunk, grads, R, wanted=wanted, V=V, B=B, gains=gains,
            scaling=scaling, dropout=dropout, stores_dS=stores_dS, is_expand=is_expand,
            others=others,
        )  # fmt: skip
    return parts


def _strides(matrix):
    return (0, 0) if matrix is None else matrix.stride()
