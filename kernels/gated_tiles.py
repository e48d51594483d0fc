"""What the kernels of a gated MLP share: gate and up as launches read them, and their tiles.

gate[M,I] = base + S[M,R] Qᵀ          Q[I,R] = s · B                  (up alike)
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launch_policy import expand_block
from .tiles import Matrix, in_units, load_tile
from .triton_version import VERSION


class Member(NamedTuple):
    """What a launcher is given of gate or up: the base product [M, I], whose columns are
    neighbours, S [M, R], B [I, R] and the scaling; no S, no low-rank part."""

    base: Any
    S: Any = None
    B: Any = None
    scaling: float = 1.0


class Branch(NamedTuple):
    """A Member as a kernel reads it; without a low-rank part s_ptr is None and R is 0."""

    base_ptr: Any
    s_ptr: Any
    B_ptr: Any
    scaling: float
    R: int
    stride_base: int
    stride_s: int
    stride_bl: int
    stride_br: int


class Down(NamedTuple):
    """Of down dS [M, R], the largest of its tiles (scaling.Shrunk) or None, and A [R, I]; without a
    low-rank part dS_ptr is None and R is 0."""

    dS_ptr: Any
    largest_ptr: Any
    A_ptr: Any
    R: int
    stride_dS: int
    stride_ar: int
    stride_al: int


class GatedTiles(NamedTuple):
    """A constant of a launch: rows and columns of a tile; columns of the rank that a program keeps,
    and in one step of S · Qᵀ; whether one step is all, and whether ranks are multiples of 8."""

    BLOCK_M: int
    BLOCK_L: int
    BLOCK_R: int
    BLOCK_E: int
    ONE_STEP: bool
    EIGHTS: bool = False


@triton.jit
def branch_in_eights(branch):
    """A Branch whose rank and rows the compiler sees to be multiples of 8, as they are."""
    return Branch(
        branch.base_ptr,
        branch.s_ptr,
        branch.B_ptr,
        branch.scaling,
        in_units(branch.R, 8),
        branch.stride_base,
        in_units(branch.stride_s, 8),
        in_units(branch.stride_bl, 8),
        branch.stride_br,
    )


@triton.jit
def down_in_eights(down):
    """A Down alike."""
    return Down(
        down.dS_ptr,
        down.largest_ptr,
        down.A_ptr,
        in_units(down.R, 8),
        in_units(down.stride_dS, 8),
        down.stride_ar,
        down.stride_al,
    )


@triton.jit
def load_scaled_B(branch, offs_l, offs_r, L):
    """A tile of Q = s · B in float32."""
    B_mat = Matrix(branch.B_ptr, branch.stride_bl, branch.stride_br, L, branch.R)
    return load_tile(B_mat, offs_l, offs_r).to(tl.float32) * tl.cast(branch.scaling, tl.float32)


@triton.jit
def load_Q(branch, offs_l, offs_r, L, u=None):
    """A tile of Q, or of its columns times u, multiplied in float32 and rounded once."""
    Q = load_scaled_B(branch, offs_l, offs_r, L)
    if u is not None:
        Q *= u[None, :]
    return Q.to(branch.base_ptr.dtype.element_ty)


@triton.jit
def _add_step(tile, branch, offs_m, offs_l, r, M, L, BLOCK_E: tl.constexpr, TARGET: tl.constexpr):
    """tile + S · Qᵀ of the columns of the rank from r on."""
    offs_r = r + tl.arange(0, BLOCK_E)
    S = load_tile(Matrix(branch.s_ptr, branch.stride_s, 1, M, branch.R), offs_m, offs_r)
    Q = load_Q(branch, offs_l, offs_r, L)
    return tl.dot(S, tl.trans(Q), tile, input_precision=TARGET.PRECISION)


@triton.jit
def load_branch(
    branch, offs_m, offs_l, M, L, TILES: tl.constexpr, TARGET: tl.constexpr
):  # fmt: skip
    """A tile of gate or up in float32, the low-rank part added to it."""
    tile = load_tile(Matrix(branch.base_ptr, branch.stride_base, 1, M, L), offs_m, offs_l)
    return plus_low_rank(tile.to(tl.float32), branch, offs_m, offs_l, M, L, TILES, TARGET)


@triton.jit
def plus_low_rank(
    tile, branch, offs_m, offs_l, M, L, TILES: tl.constexpr, TARGET: tl.constexpr
):  # fmt: skip
    """tile + S · Qᵀ of gate or up."""
    BLOCK_E: tl.constexpr = TILES.BLOCK_E
    if branch.s_ptr is not None:
        if TILES.ONE_STEP:
            tile = _add_step(tile, branch, offs_m, offs_l, 0, M, L, BLOCK_E, TARGET)
        else:
            for r in tl.range(0, branch.R, BLOCK_E, num_stages=1):
                tile = _add_step(tile, branch, offs_m, offs_l, r, M, L, BLOCK_E, TARGET)
    return tile


def branch_of(member):
    """A Member as a kernel reads it."""
    base, S, B, scaling = member
    if S is None:
        return Branch(base, None, None, 1.0, 0, base.stride(0), 0, 0, 0)
    R = S.shape[1]
    return Branch(base, S, B, float(scaling), R, base.stride(0), S.stride(0), *B.stride())


def down_of(dS, A):
    """dS, a Shrunk, and A as a kernel reads them."""
    if dS.values is None:
        return Down(None, None, None, 0, 0, 0, 0)
    R, stride = dS.values.shape[1], dS.values.stride(0)
    return Down(dS.values, dS.largest, A, R, stride, *A.stride())


def are_eights(branches, *numbers):
    """Whether the ranks and rows of branches and other numbers are multiples of 8, not all of 16,
    which the compiler sees by itself."""
    # Before 3.7 no function of a kernel returns a tuple that holds None.
    if VERSION < (3, 7):
        return False
    found = [*numbers]
    for branch in branches:
        found += [branch.R, branch.stride_s, branch.stride_bl]
    return all(n % 8 == 0 for n in found) and any(n % 16 for n in found)


def steps_of(ranks, dtype):
    """Columns of the rank in one step for layers of these ranks, and whether one step is all."""
    ranks = [R for R in ranks if R]
    step = min((expand_block(R, dtype) for R in ranks), default=16)
    return step, max(ranks, default=0) <= step
