"""The gradients of the gate of experts, and of the low-rank factors around it.

    u, gate, up, h as in expert_gate_forward        v[P,I] = base + dS2[P,R] A[e]     dS2 of down
    dw[P] = ⟨v, h⟩             dh = w v, w the routing weight of a row
    dgate = dh ⊙ shifted up ⊙ act'(gate)            dup = dh ⊙ act(gate), where up is within limits
    dB[E,2I,R] = s · duᵀ S1 of every expert         dA[E,R,I] = dS2ᵀ (w h)
    and partials of dS1 = du Q[e]  [J, P, R], of dw [J, P]

A CTA has PARTS tiles of columns of one expert and walks down all of its rows, from tile to tile of
these columns, as that of gated_backward; the gradients of the factors are whole at its end, also
those of an expert without rows, which are zero. v comes from dY before it is weighted, so that dw
needs no product of its own. dS1 and dw are summed over the columns of the CTA before they are
stored. No atomics: results are bitwise reproducible.

The registers suffice for bfloat16 and ranks that gated_policy.fits_experts names; other calls take
expert_gate_gradients. Rows of no expert are not written.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .environment import current_arch, precision_of
from .expert_gate_forward import member_rank
from .expert_gate_tiles import (
    acted,
    branches_of,
    expert_branch_in_eights,
    load_bases,
    load_Q_of,
    load_weights,
    plus_bias,
    shifted,
    store_gradients,
    through_shifted,
)
from .expert_tiles import expert_rows, of_expert
from .gated_backward import plus_product, three_zeros
from .gated_policy import pick_expert_backward
from .gated_tiles import GatedTiles, are_eights
from .launch_plans import empty, launch
from .launch_policy import rank_block, settles_products
from .profile import expert_gate_backward_name, expert_gate_backward_work, shown_as
from .tiles import Matrix, Target, in_units, load_tile, store_tile

# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = ("P",)


class ExpertDown(NamedTuple):
    """The base product of v [P, I], and of the second projection dS2 [P, R] and A [E, R, I]; the
    routing weights w [T, k], and the place in it of each row. Without a low-rank part dS_ptr is
    None and R is 0."""

    v_ptr: Any
    dS_ptr: Any
    A_ptr: Any
    w_ptr: Any
    order_ptr: Any
    R: int
    stride_v: int
    stride_dS: int
    stride_ae: int
    stride_ar: int
    stride_al: int


class ExpertSums(NamedTuple):
    """What is computed beside du, or None: dB of gate and of up [E, I, R], dAᵀ [E, I, R], partials
    of dS1 [J, P, R] and of dw [J, P]."""

    gate_ptr: Any = None
    up_ptr: Any = None
    down_ptr: Any = None
    dS_ptr: Any = None
    dw_ptr: Any = None
    stride_be: int = 0
    stride_bl: int = 0
    stride_br: int = 0
    stride_ae: int = 0
    stride_al: int = 0
    stride_ar: int = 0


@triton.jit
def _load_factors(gate, up, down, expert, offs_l, L, BLOCK_R: tl.constexpr):
    """Tiles of Q of gate and up and of Aᵀ, zero where there is none."""
    dtype = down.v_ptr.dtype.element_ty
    offs_r = tl.arange(0, BLOCK_R)
    Qg = tl.zeros([offs_l.shape[0], BLOCK_R], dtype)
    Qu, A = Qg, Qg
    if gate.s_ptr is not None:
        Qg = load_Q_of(gate, expert, offs_l, offs_r, L)
        Qu = load_Q_of(up, expert, offs_l, offs_r, L)
    if down.dS_ptr is not None:
        A_ptr = of_expert(down.A_ptr, expert, down.stride_ae)
        A = load_tile(Matrix(A_ptr, down.stride_al, down.stride_ar, L, down.R), offs_l, offs_r)
        A = A.to(dtype)
    return Qg, Qu, A


@triton.jit
def _load_narrow(gate, down, offs_m, last_m, BLOCK_R: tl.constexpr):
    """Rows of S1 and dS2, zero where there is none."""
    dtype = down.v_ptr.dtype.element_ty
    offs_r = tl.arange(0, BLOCK_R)
    S = tl.zeros([offs_m.shape[0], BLOCK_R], dtype)
    dS = S
    if gate.s_ptr is not None:
        S = load_tile(Matrix(gate.s_ptr, gate.stride_s, 1, last_m, gate.R), offs_m, offs_r)
    if down.dS_ptr is not None:
        dS = load_tile(Matrix(down.dS_ptr, down.stride_dS, 1, last_m, down.R), offs_m, offs_r)
    return S, dS


@triton.jit
def _store_gradients(
    gate, up, down, expert, factors, narrow, w, dgate_mat, dup_mat, offs_m, first_l,
    NEEDS_w: tl.constexpr, GLU: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Store dgate and dup of one tile; gives both, w h, all rounded, and ⟨v, h⟩."""
    BLOCK_L: tl.constexpr = TILES.BLOCK_L
    dtype = dgate_mat.ptr.dtype.element_ty
    last_m, L = dgate_mat.size_0, dgate_mat.size_1
    offs_l = first_l + tl.arange(0, BLOCK_L)
    Qg, Qu, A = factors
    S, dS = narrow
    x, u = load_bases(gate, up, offs_m, first_l, last_m, L, BLOCK_L, GLU.interleaved)
    if gate.s_ptr is not None:
        x = tl.dot(S, tl.trans(Qg), x, input_precision=TARGET.PRECISION)
    a, slope = acted(plus_bias(x, gate, expert, offs_l, L), GLU)
    if gate.s_ptr is not None:
        u = tl.dot(S, tl.trans(Qu), u, input_precision=TARGET.PRECISION)
    u = plus_bias(u, up, expert, offs_l, L)
    factor = shifted(u, GLU)
    h = a * factor
    v = load_tile(Matrix(down.v_ptr, down.stride_v, 1, last_m, L), offs_m, offs_l).to(tl.float32)
    if down.dS_ptr is not None:
        v = tl.dot(dS, tl.trans(A), v, input_precision=TARGET.PRECISION)
    dw = w
    if NEEDS_w:
        dw = tl.sum(v * h, 1)
    dh = v * w[:, None]
    dgate = (dh * (factor * slope)).to(dtype)
    dup = through_shifted(dh * a, u, GLU).to(dtype)
    store_gradients(dgate_mat, dup_mat, dgate, dup, offs_m, first_l, GLU.interleaved)
    return dgate, dup, (h * w[:, None]).to(dtype), dw


@triton.jit
def _store_parts(sums, dS, dw, block, P, last_m, R, offs_m):
    """The partials of dS1 and dw of a block of columns."""
    if sums.dS_ptr is not None:
        first = sums.dS_ptr + tl.cast(block, tl.int64) * P * R
        store_tile(Matrix(first, R, 1, last_m, R), dS, offs_m, tl.arange(0, dS.shape[1]))
    if sums.dw_ptr is not None:
        first = sums.dw_ptr + tl.cast(block, tl.int64) * P
        tl.store(first + offs_m, dw, mask=offs_m < last_m)


@triton.jit
def _walk_rows(
    gate, up, down, sums, expert, dgate_mat, dup_mat, first_m, P, block,
    GLU: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """All rows of an expert: the sums of dB of gate and up and of dAᵀ of every tile."""
    BLOCK_M: tl.constexpr = TILES.BLOCK_M
    BLOCK_L: tl.constexpr = TILES.BLOCK_L
    BLOCK_R: tl.constexpr = TILES.BLOCK_R
    last_m, L = dgate_mat.size_0, dgate_mat.size_1
    Tg0, Tu0, Td0 = three_zeros(BLOCK_L, BLOCK_R)
    Tg1, Tu1, Td1 = three_zeros(BLOCK_L, BLOCK_R)
    Tg2, Tu2, Td2 = three_zeros(BLOCK_L, BLOCK_R)
    Tg3, Tu3, Td3 = three_zeros(BLOCK_L, BLOCK_R)
    dS1 = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    dw = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.range(0, tl.cdiv(last_m - first_m, BLOCK_M) * PARTS, num_stages=1):
        offs_m = first_m + i // PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
        first_l = (block * PARTS + i % PARTS) * BLOCK_L
        S, dS = _load_narrow(gate, down, offs_m, last_m, BLOCK_R)
        factors = _load_factors(
            gate, up, down, expert, first_l + tl.arange(0, BLOCK_L), L, BLOCK_R
        )  # fmt: skip
        w = load_weights(down.w_ptr, down.order_ptr, offs_m, last_m)
        dgate, dup, h, part = _store_gradients(
            gate, up, down, expert, factors, (S, dS), w, dgate_mat, dup_mat, offs_m, first_l,
            sums.dw_ptr is not None, GLU, TILES, TARGET,
        )  # fmt: skip
        # Each product by itself: no other one lies between the steps of a sum.
        if sums.gate_ptr is not None:
            Tg0 = plus_product(Tg0, tl.trans(dgate), S, TARGET)
            Tu0 = plus_product(Tu0, tl.trans(dup), S, TARGET)
        if sums.dS_ptr is not None:
            dS1 = plus_product(dS1, dgate, factors[0], TARGET)
            dS1 = plus_product(dS1, dup, factors[1], TARGET)
        if sums.down_ptr is not None:
            Td0 = plus_product(Td0, tl.trans(h), dS, TARGET)
        if sums.dw_ptr is not None:
            dw += part
        if i % PARTS == PARTS - 1:
            _store_parts(sums, dS1, dw, block, P, last_m, gate.R, offs_m)
            dS1 = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            dw = tl.zeros([BLOCK_M], tl.float32)
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
def _store_factor(ptr, expert, T, scale, offs_l, L, R, stride_e, stride_l, stride_r):
    """scale · the gradient of some rows of an expert's factor."""
    if ptr is not None:
        grad_mat = Matrix(of_expert(ptr, expert, stride_e), stride_l, stride_r, L, R)
        store_tile(grad_mat, T * tl.cast(scale, tl.float32), offs_l, tl.arange(0, T.shape[1]))


@triton.jit(
    do_not_specialize=_VARYING, **shown_as(expert_gate_backward_name, expert_gate_backward_work)
)
def expert_gate_backward(
    gate, up, down, sums, offsets_ptr, dgate_ptr, dup_ptr, P, L, stride_du,
    GLU: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Program (block of PARTS tiles of columns, expert)."""
    if TILES.EIGHTS:
        gate = expert_branch_in_eights(gate)
        up = expert_branch_in_eights(up)
    UNIT: tl.constexpr = 8 if TILES.EIGHTS else 1
    down = ExpertDown(
        down.v_ptr, down.dS_ptr, down.A_ptr, down.w_ptr, down.order_ptr,
        in_units(down.R, UNIT), down.stride_v, in_units(down.stride_dS, UNIT),
        down.stride_ae, down.stride_ar, down.stride_al,
    )  # fmt: skip
    block, expert = tl.program_id(0), tl.program_id(1)
    first_m, last_m = expert_rows(expert, offsets_ptr)
    T = _walk_rows(
        gate, up, down, sums, expert, Matrix(dgate_ptr, stride_du, 1, last_m, L),
        Matrix(dup_ptr, stride_du, 1, last_m, L), first_m, P, block, GLU, PARTS, TILES, TARGET,
    )  # fmt: skip
    first_l = block * PARTS * TILES.BLOCK_L + tl.arange(0, TILES.BLOCK_L)
    for part in tl.static_range(PARTS):
        offs_l = first_l + part * TILES.BLOCK_L
        _store_factor(
            sums.gate_ptr, expert, T[part][0], gate.scaling, offs_l, L, gate.R,
            sums.stride_be, sums.stride_bl, sums.stride_br,
        )  # fmt: skip
        _store_factor(
            sums.up_ptr, expert, T[part][1], up.scaling, offs_l, L, up.R,
            sums.stride_be, sums.stride_bl, sums.stride_br,
        )  # fmt: skip
        _store_factor(
            sums.down_ptr, expert, T[part][2], 1.0, offs_l, L, down.R,
            sums.stride_ae, sums.stride_al, sums.stride_ar,
        )  # fmt: skip


class Wanted(NamedTuple):
    """What a launch computes beside du: gradients of factors, dS1 and dw."""

    B: bool = False
    A: bool = False
    dS: bool = False
    w: bool = False


class Found(NamedTuple):
    """du [P, 2I]; dB [E, 2I, R] of the first projection and dA [E, R, I] of the second, in the
    dtype of the factor, or None; partials of dS1 [J, P, R] and dw [J, P] in float32, or None."""

    du: Any
    B: Any = None
    A: Any = None
    dS: Any = None
    dw: Any = None


def gradients(member, v, w, order, offsets, glu, dS=None, A=None, *, wanted, out, config=None):
    """Found, in one launch, for an ExpertMember, the base product v [P, I], the routing weights w
    [T, k], contiguous, and of the second projection dS2 [P, R] and A [E, R, I].

    order [P]: the place in w of each row. offsets [E]: where the rows of each expert end. out: the
    memory of du [P, 2I], which may be that of the base product of u.
    """
    (P, L), E = v.shape, offsets.shape[0]
    ranks = [member_rank(member), 0 if dS is None else dS.shape[1]]
    BLOCK_R, arch = rank_block(max(*ranks, 1)), current_arch()
    config = config or pick_expert_backward(BLOCK_R, arch, plain=glu.is_plain)
    width = config.BLOCK_L * config.PARTS
    blocks = -(-L // width)
    dB = empty(v, *member.B.shape, dtype=member.B.dtype) if wanted.B else None
    dA = empty(v, *A.shape, dtype=A.dtype) if wanted.A else None
    # A partial is written and read in float32, where du would be read once more.
    stores_dS = wanted.dS and 2 * width * v.element_size() >= 2 * 4 * ranks[0]
    parts = empty(v, blocks, P, ranks[0], dtype=torch.float32) if stores_dS else None
    dw = empty(v, blocks, P, dtype=torch.float32) if wanted.w else None
    gate_B, up_B = glu.halves(dB, 1)
    sums = ExpertSums(
        gate_B, up_B, None if dA is None else dA.mT, parts, dw,
        *((0, 0, 0) if dB is None else gate_B.stride()),
        *((0, 0, 0) if dA is None else dA.mT.stride()),
    )  # fmt: skip
    down = ExpertDown(v, None, None, w, order, 0, v.stride(0), 0, 0, 0, 0)
    if ranks[1]:
        down = ExpertDown(v, dS, A, w, order, ranks[1], v.stride(0), dS.stride(0), *A.stride())
    branches = branches_of(member, glu)
    eights = are_eights(branches, down.R, down.stride_dS)
    launch(
        expert_gate_backward, (blocks, E),
        *branches, down, sums, offsets, *glu.halves(out, 1), P, L, out.stride(0),
        GLU=glu, PARTS=config.PARTS,
        TILES=GatedTiles(config.BLOCK_M, config.BLOCK_L, BLOCK_R, BLOCK_R, True, eights),
        TARGET=Target(precision_of(v.dtype), SETTLES=settles_products(v.dtype, arch)),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return Found(out, dB, dA, parts, dw)
