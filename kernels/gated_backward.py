"""The gradients of the activation of a gated MLP, and of the low-rank factors around it.

    gate, up, h as in gated_forward       dh[M,I] = base + drop'(dS[M,R] A[R,I])       dS of down
    dgate = dh ⊙ up ⊙ act'(gate)          dup = dh ⊙ act(gate)
    dB[I,R] = s · dgateᵀ Sg, s · dupᵀ Su  dA[R,I] = dSᵀ drop(h)
    and partials of dSg = dgate Qg, dSu = dup Qu                                      [J, M, R]

A CTA has PARTS tiles of columns and walks down one range of rows, from tile to tile of these
columns. It reads each element of gate, up and dh once and stores dgate and dup, in the memory of
gate and up where the caller wants that; h it never stores. The gradients of the factors stay in
registers, those of the tile that is next in T0: the loop turns them by one, which costs moves,
where a copy of the loop for each tile costs more registers than there are. dS is summed over the
columns of the CTA before it is stored: few of them would cost as much as a second read of dgate
and dup. Ranges write partial sums of the factors; the CTA that arrives last at its columns adds
them in the order of the ranges. dS is added by the launch that needs it (ticketed_gemm). No float
atomics: results are bitwise reproducible.

The registers suffice for ranks that `fits_registers` names; other calls take gated_gradients.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .activations import activated
from .dropout import NO_DROPOUT, Words, keep_mask, seed_of
from .environment import current_arch, precision_of
from .gated_policy import pick_gated_backward, rows_each
from .gated_scales import Scales, load_dS, scaled_dS, scaled_Q, scales_of, unscaled
from .gated_tiles import (
    GatedTiles,
    are_eights,
    branch_in_eights,
    branch_of,
    down_in_eights,
    down_of,
    load_Q,
)
from .launch_plans import empty, launch
from .launch_policy import rank_block, settles_products
from .profile import gated_backward_name, gated_backward_work, shown_as
from .scaling import Shrunk
from .sync_layout import ARRIVALS
from .tiles import Matrix, Target, load_tile, settled, store_tile
from .workspace import sync_words

# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = ("M", "rows_per_range", "ranges", "seed_low", "seed_high", "threshold")


class Sums(NamedTuple):
    """Of gate, up or down, or None: the partial sums [ranges, I, R] of a factor's gradient, the
    gradient [I, R] (of down dAᵀ), and partials of dS [J, M, R]."""

    T_ptr: Any = None
    grad_ptr: Any = None
    dS_ptr: Any = None
    stride_l: int = 0
    stride_r: int = 0


@triton.jit
def _load_factors(gate, up, down, offs_l, L, BLOCK_R: tl.constexpr):
    """Tiles of Qg, Qu and Aᵀ, zero where there is none."""
    dtype = gate.base_ptr.dtype.element_ty
    offs_r = tl.arange(0, BLOCK_R)
    Qg = tl.zeros([offs_l.shape[0], BLOCK_R], dtype)
    Qu, A = Qg, Qg
    if gate.s_ptr is not None:
        Qg = load_Q(gate, offs_l, offs_r, L)
    if up.s_ptr is not None:
        Qu = load_Q(up, offs_l, offs_r, L)
    if down.dS_ptr is not None:
        A_mat = Matrix(down.A_ptr, down.stride_al, down.stride_ar, L, down.R)
        A = load_tile(A_mat, offs_l, offs_r).to(dtype)
    return Qg, Qu, A


@triton.jit
def _load_narrow(gate, up, down, scales, offs_m, M, BLOCK_R: tl.constexpr):
    """Rows of Sg, Su and dS, zero where there is none; dS scaled."""
    dtype = gate.base_ptr.dtype.element_ty
    offs_r = tl.arange(0, BLOCK_R)
    Sg = tl.zeros([offs_m.shape[0], BLOCK_R], dtype)
    Su, dS = Sg, Sg
    if gate.s_ptr is not None:
        Sg = load_tile(Matrix(gate.s_ptr, gate.stride_s, 1, M, gate.R), offs_m, offs_r)
    if up.s_ptr is not None:
        Su = load_tile(Matrix(up.s_ptr, up.stride_s, 1, M, up.R), offs_m, offs_r)
    if down.dS_ptr is not None:
        dS = load_dS(down, scales.dh, dtype, offs_m, offs_r, M)
    return Sg, Su, dS


@triton.jit
def _store_gradients(
    gate, up, down, dh_mat, factors, narrow, scales, dgate_mat, dup_mat, words, seed, offs_m,
    first_l,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Store dgate and dup of one tile; gives both and drop(h), rounded, h without its scale."""
    BLOCK_L: tl.constexpr = TILES.BLOCK_L
    dtype = dgate_mat.ptr.dtype.element_ty
    M, L = dgate_mat.size_0, dgate_mat.size_1
    offs_l = first_l + tl.arange(0, BLOCK_L)
    Qg, Qu, A = factors
    Sg, Su, dS = narrow
    # In this order, since fewest tiles are alive at a time.
    x = load_tile(Matrix(gate.base_ptr, gate.stride_base, 1, M, L), offs_m, offs_l)
    x = x.to(tl.float32)
    if gate.s_ptr is not None:
        x = tl.dot(Sg, tl.trans(Qg), x, input_precision=TARGET.PRECISION)
    a, slope = activated(x, ACTIVATION)
    u = load_tile(Matrix(up.base_ptr, up.stride_base, 1, M, L), offs_m, offs_l).to(tl.float32)
    if up.s_ptr is not None:
        u = tl.dot(Su, tl.trans(Qu), u, input_precision=TARGET.PRECISION)
    h = (a * u).to(dtype)
    slope *= u
    dh = load_tile(dh_mat, offs_m, offs_l).to(tl.float32)
    if down.dS_ptr is not None:
        if DROPOUT:
            part = tl.dot(dS, tl.trans(A), input_precision=TARGET.PRECISION)
            keep = keep_mask(words, seed, offs_m, first_l, BLOCK_L)
            part_scale = tl.cast(words.keep_scale, tl.float32)
            if scales.dh is not None:
                part_scale *= scales.dh_inverse
            dh += tl.where(keep, part * part_scale, 0.0)
            h = tl.where(keep, h, 0.0)
        elif scales.dh is not None:
            part = tl.dot(dS, tl.trans(A), input_precision=TARGET.PRECISION)
            dh += part * scales.dh_inverse
        else:
            dh = tl.dot(dS, tl.trans(A), dh, input_precision=TARGET.PRECISION)
    dgate, dup = (dh * slope).to(dtype), (dh * a).to(dtype)
    store_tile(dgate_mat, dgate, offs_m, offs_l)
    store_tile(dup_mat, dup, offs_m, offs_l)
    return dgate, dup, h


@triton.jit
def plus_product(acc, a, b, TARGET: tl.constexpr):
    """acc + a b, complete at its end."""
    acc = tl.dot(a, b, acc, input_precision=TARGET.PRECISION)
    if TARGET.SETTLES:
        acc = settled(acc)
    return acc


@triton.jit
def _store_dS(sums, dS, u, block, M, last_m, R, offs_m):
    """The partial of dS of a block of columns."""
    if sums.dS_ptr is not None:
        first = sums.dS_ptr + tl.cast(block, tl.int64) * M * R
        dS = unscaled(dS, u)
        store_tile(Matrix(first, R, 1, last_m, R), dS, offs_m, tl.arange(0, dS.shape[1]))


@triton.jit
def three_zeros(BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr):
    """Three sums that begin. Within a loop Triton takes two names of one tensor for one sum, and
    two tuples of the same tensors for one, so each has its own and there are no tuples."""
    return (
        tl.zeros([BLOCK_L, BLOCK_R], tl.float32),
        tl.zeros([BLOCK_L, BLOCK_R], tl.float32),
        tl.zeros([BLOCK_L, BLOCK_R], tl.float32),
    )


@triton.jit
def _walk_rows(
    gate, up, down, dh_mat, gate_sums, up_sums, down_sums, scales, dgate_mat, dup_mat, words,
    first_m, M, block,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Rows from first_m to the end of dgate_mat: the sums of dB, dB and dAᵀ of every tile."""
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_L: tl.constexpr = TILES.BLOCK_L
    BLOCK_R: tl.constexpr = TILES.BLOCK_R
    last_m, L = dgate_mat.size_0, dgate_mat.size_1
    seed = seed_of(words)
    Tg0, Tu0, Td0 = three_zeros(BLOCK_L, BLOCK_R)
    Tg1, Tu1, Td1 = three_zeros(BLOCK_L, BLOCK_R)
    Tg2, Tu2, Td2 = three_zeros(BLOCK_L, BLOCK_R)
    Tg3, Tu3, Td3 = three_zeros(BLOCK_L, BLOCK_R)
    dSg = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    dSu = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for i in tl.range(0, tl.cdiv(last_m - first_m, BLOCK_M) * PARTS, num_stages=1):
        offs_m = first_m + i // PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
        first_l = (block * PARTS + i % PARTS) * BLOCK_L
        narrow = _load_narrow(gate, up, down, scales, offs_m, last_m, BLOCK_R)
        offs_l = first_l + tl.arange(0, BLOCK_L)
        factors = _load_factors(gate, up, down, offs_l, L, BLOCK_R)
        dgate, dup, h = _store_gradients(
            gate, up, down, dh_mat, factors, narrow, scales, dgate_mat, dup_mat, words, seed,
            offs_m, first_l, ACTIVATION, DROPOUT, TILES, TARGET,
        )  # fmt: skip
        # Each product by itself: no other one lies between the steps of a sum.
        if gate_sums.T_ptr is not None:
            Tg0 = plus_product(Tg0, tl.trans(dgate), narrow[0], TARGET)
        if gate_sums.dS_ptr is not None:
            Q = scaled_Q(gate, factors[0], scales.gate, offs_l, L)
            dSg = plus_product(dSg, dgate, Q, TARGET)
        if up_sums.T_ptr is not None:
            Tu0 = plus_product(Tu0, tl.trans(dup), narrow[1], TARGET)
        if up_sums.dS_ptr is not None:
            Q = scaled_Q(up, factors[1], scales.up, offs_l, L)
            dSu = plus_product(dSu, dup, Q, TARGET)
        if down_sums.T_ptr is not None:
            dS = scaled_dS(down, narrow[2], scales.down, offs_m, last_m)
            Td0 = plus_product(Td0, tl.trans(h), dS, TARGET)
        if i % PARTS == PARTS - 1:
            _store_dS(gate_sums, dSg, scales.gate, block, M, last_m, gate.R, offs_m)
            _store_dS(up_sums, dSu, scales.up, block, M, last_m, up.R, offs_m)
            dSg = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            dSu = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        if PARTS >= 2:
            g, u, d = Tg0, Tu0, Td0
            Tg0, Tu0, Td0 = Tg1, Tu1, Td1
            if PARTS == 2:
                Tg1, Tu1, Td1 = g, u, d
            else:
                Tg1, Tu1, Td1 = Tg2, Tu2, Td2
                if PARTS == 3:
                    Tg2, Tu2, Td2 = g, u, d
                else:
                    Tg2, Tu2, Td2 = Tg3, Tu3, Td3
                    Tg3, Tu3, Td3 = g, u, d
    return (Tg0, Tu0, Td0), (Tg1, Tu1, Td1), (Tg2, Tu2, Td2), (Tg3, Tu3, Td3)


@triton.jit
def _store_partial(sums, T, range_index, offs_l, L, R):
    """A partial sum of a factor's gradient."""
    if sums.T_ptr is not None:
        first = sums.T_ptr + tl.cast(range_index, tl.int64) * L * R
        store_tile(Matrix(first, R, 1, L, R), T, offs_l, tl.arange(0, T.shape[1]))


@triton.jit
def _store_factor(sums, ranges, scale, offs_l, L, R, BLOCK_R: tl.constexpr):
    """scale · the sum of all partial sums, always in their order."""
    if sums.T_ptr is not None:
        offs_r = tl.arange(0, BLOCK_R)
        total = tl.zeros([offs_l.shape[0], BLOCK_R], tl.float32)
        for i in range(0, ranges):
            first = sums.T_ptr + tl.cast(i, tl.int64) * L * R
            total += load_tile(Matrix(first, R, 1, L, R), offs_l, offs_r)
        grad_mat = Matrix(sums.grad_ptr, sums.stride_l, sums.stride_r, L, R)
        store_tile(grad_mat, total * tl.cast(scale, tl.float32), offs_l, offs_r)


@triton.jit(do_not_specialize=_VARYING, **shown_as(gated_backward_name, gated_backward_work))
def gated_backward(
    gate, up, down, gate_sums, up_sums, down_sums, dh_ptr, dgate_ptr, dup_ptr, sync_ptr, keep_scale,
    seed_ptr, seed_low, seed_high, threshold, M, L, rows_per_range, ranges, tile_rows, stride_dh,
    stride_dgate, stride_dup,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Program (block of PARTS tiles of columns, range of rows)."""
    block, range_index = tl.program_id(0), tl.program_id(1)
    if TILES.EIGHTS:
        gate = branch_in_eights(gate)
        up = branch_in_eights(up)
        down = down_in_eights(down)
    BLOCK_R: tl.constexpr = TILES.BLOCK_R
    first_m = range_index * rows_per_range
    last_m = tl.minimum(first_m + rows_per_range, M)
    scales = Scales(None, None, None, None, None)
    if dh_ptr.dtype.element_ty == tl.float16:
        scales = scales_of(
            gate, up, down, gate_sums, up_sums, down_sums, block, L, first_m, last_m, tile_rows,
            PARTS, TILES,
        )  # fmt: skip
    T = _walk_rows(
        gate, up, down, Matrix(dh_ptr, stride_dh, 1, last_m, L), gate_sums, up_sums, down_sums,
        scales,
        Matrix(dgate_ptr, stride_dgate, 1, last_m, L), Matrix(dup_ptr, stride_dup, 1, last_m, L),
        Words(seed_ptr, seed_low, seed_high, threshold, keep_scale), first_m, M, block,
        ACTIVATION, DROPOUT, PARTS, TILES, TARGET,
    )  # fmt: skip
    first_l = block * PARTS * TILES.BLOCK_L + tl.arange(0, TILES.BLOCK_L)
    for part in tl.static_range(PARTS):
        offs_l = first_l + part * TILES.BLOCK_L
        _store_partial(gate_sums, T[part][0], range_index, offs_l, L, gate.R)
        _store_partial(up_sums, T[part][1], range_index, offs_l, L, up.R)
        T_d = unscaled(T[part][2], scales.down)
        _store_partial(down_sums, T_d, range_index, offs_l, L, down.R)
    if sync_ptr is not None:
        # Every warp's partial sums must be stored before one thread counts this CTA as arrived.
        tl.debug_barrier()
        if tl.atomic_add(sync_ptr + ARRIVALS + block, 1, sem="acq_rel") == ranges - 1:
            tl.store(sync_ptr + ARRIVALS + block, 0)
            for tile in range(0, PARTS):
                of_tile = first_l + tile * TILES.BLOCK_L
                _store_factor(gate_sums, ranges, gate.scaling, of_tile, L, gate.R, BLOCK_R)
                _store_factor(up_sums, ranges, up.scaling, of_tile, L, up.R, BLOCK_R)
                _store_factor(down_sums, ranges, keep_scale, of_tile, L, down.R, BLOCK_R)


class Wanted(NamedTuple):
    """Which gradients of factors a launch computes, and whether dS of gate and up."""

    gate_B: bool = False
    up_B: bool = False
    down_A: bool = False
    dS: bool = False


class Found(NamedTuple):
    """dgate and dup [M, I]; dB [I, R], dA [R, I] or None; partials of dS [J, M, R] of gate and up
    or None. Gradients have the dtype of the factor."""

    dgate: Any
    dup: Any
    gate_B: Any = None
    up_B: Any = None
    down_A: Any = None
    gate_dS: Any = None
    up_dS: Any = None


def gradients(
    gate, up, dh, activation, dS=None, A=None, dropout=NO_DROPOUT, *, wanted, outs, joined=False,
    config=None,
):  # fmt: skip
    """Found, in one launch, for the Members gate and up, the base product dh [M, I], and of down
    dS, a Shrunk, and A [R, I].

    outs: the memory of dgate and dup [M, I], which may be that of gate and up. joined: gate and up
    are halves of one layer, whose dB [2I, R] and partials of dS [2J, M, R] are those of gate.
    """
    M, L = dh.shape
    dS = Shrunk(None) if dS is None else dS
    branches, down = (branch_of(gate), branch_of(up)), down_of(dS, A)
    ranks = [branches[0].R, branches[1].R, down.R]
    BLOCK_R, arch = rank_block(max(*ranks, 1)), current_arch()
    drops = dropout.p > 0.0 and down.R > 0
    config = config or pick_gated_backward(BLOCK_R, arch, drops=drops, dtype=dh.dtype)
    blocks = -(-L // (config.BLOCK_L * config.PARTS))
    rows = rows_each(config, M, blocks)
    ranges = -(-M // rows)
    found = _memory(config, gate, up, dh, A, ranks, wanted, outs, joined)
    has_sums = any(wanted[:3])
    eights = are_eights(branches, down.R, down.stride_dS)
    seed, seed_low, seed_high, threshold = dropout.words()
    launch(
        gated_backward, (blocks, ranges),
        *branches, down, *_sums(found, dh, ranks, ranges, joined), dh, *outs,
        sync_words(dh.device, ARRIVALS.value + blocks) if has_sums else None,
        dropout.keep_scale if drops else 1.0, seed, seed_low, seed_high, threshold,
        M, L, rows, ranges, dS.tile_rows, dh.stride(0), outs[0].stride(0), outs[1].stride(0),
        ACTIVATION=activation, DROPOUT=drops, PARTS=config.PARTS,
        TILES=GatedTiles(config.BLOCK_M, config.BLOCK_L, BLOCK_R, BLOCK_R, True, eights),
        TARGET=Target(precision_of(dh.dtype), SETTLES=settles_products(dh.dtype, arch)),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return found


def _memory(config, gate, up, dh, A, ranks, wanted, outs, joined):
    """Found, not computed yet: partials of dS where they cost less than to read dgate again."""
    (M, L), times = dh.shape, 2 if joined else 1
    width = config.BLOCK_L * config.PARTS
    factors, partials = [], []
    for member, R, needed in zip((gate, up), ranks, wanted, strict=False):
        grad = part = None
        is_half = joined and factors
        if needed and not is_half:
            grad = empty(dh, times * L, R, dtype=member.B.dtype)
        # A partial is written and read in float32.
        if wanted.dS and R and not is_half and width * dh.element_size() >= 2 * 4 * R:
            part = empty(dh, times * -(-L // width), M, R, dtype=torch.float32)
        factors.append(grad)
        partials.append(part)
    dA = empty(dh, *A.shape, dtype=A.dtype) if wanted.down_A else None
    return Found(*outs, *factors, dA, *partials)


def _sums(found, dh, ranks, ranges, joined):
    """The Sums of gate, up and down: where a kernel finds the memory of `found`."""
    grads, partials = [found.gate_B, found.up_B], [found.gate_dS, found.up_dS]
    if joined:
        grads = [None, None] if found.gate_B is None else found.gate_B.chunk(2)
        partials = [None, None] if found.gate_dS is None else found.gate_dS.chunk(2)
    dA = None if found.down_A is None else found.down_A.T
    sums = []
    for grad, part, R in zip((*grads, dA), (*partials, None), ranks, strict=True):
        if grad is None:
            sums.append(Sums(dS_ptr=part))
        else:
            T = empty(dh, ranges, dh.shape[1], R, dtype=torch.float32)
            sums.append(Sums(T, grad, part, *grad.stride()))
    return sums
