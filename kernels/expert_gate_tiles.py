"""What the kernels of the experts' gate share: the gate, and gate and up of one expert's rows.

    u[P,2I] = base + S[P,R] Q[e]ᵀ + bias[e]      Q[E,2I,R] = s · B          e: the expert of a row
    h[P,I] = act(gate) ⊙ up                      [gate | up] = u, or each pair of columns is one
    with a limit c: gate ← min(gate, c), up ← max(−c, min(up, c)) + shift, act(x) ← act(αx) / α

Rows are sorted by their expert: those of e end at offsets[e]. Offsets stay on the device.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .activations import activated
from .expert_tiles import of_expert
from .gated_tiles import Branch, load_Q, plus_low_rank
from .tiles import Matrix, in_units, load_tile, store_tile


class Glu(NamedTuple):
    """A constant of a launch, the gate: an activation by its name, whether gate and up are pairs of
    neighbouring columns, the limit or None, α and the shift."""

    activation: str = "silu"
    interleaved: bool = False
    limit: float | None = None
    alpha: float = 1.0
    shift: float = 0.0

    @property
    def is_plain(self):
        """Whether it is act(gate) ⊙ up of halves, for which the fewest registers suffice."""
        return self == Glu(self.activation)

    def halves(self, both, dim):
        """gate's and up's part of a tensor along the dimension of u's columns, as views."""
        if both is None:
            return None, None
        if not self.interleaved:
            return both.chunk(2, dim)
        pairs = both.unflatten(dim, (-1, 2))
        return pairs.select(dim + 1, 0), pairs.select(dim + 1, 1)


class ExpertMember(NamedTuple):
    """What a launcher is given of the first projection: the base product [P, 2I], whose columns are
    neighbours, S [P, R], B [E, 2I, R], bias [E, 2I] and the scaling; no S, no low-rank part."""

    base: Any
    S: Any = None
    B: Any = None
    bias: Any = None
    scaling: float = 1.0


class ExpertBranch(NamedTuple):
    """gate or up as a kernel reads it, of all experts; see gated_tiles.Branch."""

    base_ptr: Any
    s_ptr: Any
    B_ptr: Any
    bias_ptr: Any
    scaling: float
    R: int
    stride_base: int
    stride_s: int
    stride_be: int
    stride_bl: int
    stride_br: int
    stride_bias_e: int
    stride_bias_l: int


@triton.jit
def expert_branch_in_eights(branch):
    """An ExpertBranch whose rank and rows the compiler sees to be multiples of 8, as they are."""
    return ExpertBranch(
        branch.base_ptr, branch.s_ptr, branch.B_ptr, branch.bias_ptr, branch.scaling,
        in_units(branch.R, 8), branch.stride_base, in_units(branch.stride_s, 8),
        branch.stride_be, in_units(branch.stride_bl, 8), branch.stride_br,
        branch.stride_bias_e, branch.stride_bias_l,
    )  # fmt: skip


@triton.jit
def with_low_rank(
    tile, branch, expert, offs_m, offs_l, last_m, L, TILES: tl.constexpr, TARGET: tl.constexpr
):  # fmt: skip
    """tile + S Q[e]ᵀ + bias[e] of gate or up."""
    of_one = Branch(
        branch.base_ptr, branch.s_ptr, of_expert(branch.B_ptr, expert, branch.stride_be),
        branch.scaling, branch.R, branch.stride_base, branch.stride_s, branch.stride_bl,
        branch.stride_br,
    )  # fmt: skip
    tile = plus_low_rank(tile, of_one, offs_m, offs_l, last_m, L, TILES, TARGET)
    return plus_bias(tile, branch, expert, offs_l, L)


@triton.jit
def load_Q_of(branch, expert, offs_l, offs_r, L):
    """A tile of Q[e] of gate or up."""
    of_one = Branch(
        branch.base_ptr, branch.s_ptr, of_expert(branch.B_ptr, expert, branch.stride_be),
        branch.scaling, branch.R, branch.stride_base, branch.stride_s, branch.stride_bl,
        branch.stride_br,
    )  # fmt: skip
    return load_Q(of_one, offs_l, offs_r, L)


@triton.jit
def load_weights(w_ptr, order_ptr, offs_m, last_m):
    """The routing weights of rows, from where top_k_index has them."""
    places = tl.load(order_ptr + offs_m, mask=offs_m < last_m, other=0)
    return tl.load(w_ptr + places, mask=offs_m < last_m, other=0.0).to(tl.float32)


@triton.jit
def load_bases(
    gate, up, offs_m, first_l, last_m, L, BLOCK_L: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """Tiles of the base products of gate and up, in float32."""
    if INTERLEAVED:
        offs = 2 * first_l + tl.arange(0, 2 * BLOCK_L)
        both = load_tile(Matrix(gate.base_ptr, gate.stride_base, 1, last_m, 2 * L), offs_m, offs)
        x, u = tl.split(tl.reshape(both, [offs_m.shape[0], BLOCK_L, 2]))
    else:
        offs_l = first_l + tl.arange(0, BLOCK_L)
        x = load_tile(Matrix(gate.base_ptr, gate.stride_base, 1, last_m, L), offs_m, offs_l)
        u = load_tile(Matrix(up.base_ptr, up.stride_base, 1, last_m, L), offs_m, offs_l)
    return x.to(tl.float32), u.to(tl.float32)


@triton.jit
def plus_bias(tile, branch, expert, offs_l, L):
    """tile + the bias of an expert, if there is one."""
    if branch.bias_ptr is not None:
        ptr = of_expert(branch.bias_ptr, expert, branch.stride_bias_e)
        bias = tl.load(ptr + offs_l * branch.stride_bias_l, mask=offs_l < L, other=0.0)
        tile += bias.to(tl.float32)[None, :]
    return tile


@triton.jit
def store_gradients(
    dgate_mat, dup_mat, dgate, dup, offs_m, first_l, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """Store tiles of dgate and dup where gate and up are."""
    BLOCK_L: tl.constexpr = dgate.shape[1]
    if INTERLEAVED:
        offs = 2 * first_l + tl.arange(0, 2 * BLOCK_L)
        both = tl.reshape(tl.join(dgate, dup), [dgate.shape[0], 2 * BLOCK_L])
        du_mat = Matrix(
            dgate_mat.ptr, dgate_mat.stride_0, 1, dgate_mat.size_0, 2 * dgate_mat.size_1
        )
        store_tile(du_mat, both, offs_m, offs)
    else:
        offs_l = first_l + tl.arange(0, BLOCK_L)
        store_tile(dgate_mat, dgate, offs_m, offs_l)
        store_tile(dup_mat, dup, offs_m, offs_l)


@triton.jit
def acted(gate, GLU: tl.constexpr):
    """act(gate) and its slope; no slope above the limit."""
    # Triton 3.6 passes constants on only by names of their own.
    ACTIVATION: tl.constexpr = GLU.activation
    ALPHA: tl.constexpr = GLU.alpha
    x = gate
    if GLU.limit is not None:
        x = tl.where(gate > GLU.limit, GLU.limit, gate)
    if GLU.alpha != 1.0:
        a, slope = activated(x * ALPHA, ACTIVATION)
        a *= 1.0 / ALPHA
    else:
        a, slope = activated(x, ACTIVATION)
    if GLU.limit is not None:
        slope = tl.where(gate > GLU.limit, 0.0, slope)
    return a, slope


@triton.jit
def shifted(up, GLU: tl.constexpr):
    """The factor that up is in h."""
    if GLU.limit is not None:
        up = tl.where(up > GLU.limit, GLU.limit, tl.where(up < -GLU.limit, -GLU.limit, up))
    if GLU.shift != 0.0:
        up += GLU.shift
    return up


@triton.jit
def through_shifted(tile, up, GLU: tl.constexpr):
    """tile · the slope of `shifted`."""
    if GLU.limit is not None:
        tile = tl.where(tl.abs(up) > GLU.limit, 0.0, tile)
    return tile


def branches_of(member, glu):
    """gate and up of an ExpertMember as a kernel reads them."""
    base, S, B, bias, scaling = member
    found = []
    for half, B_half, bias_half in zip(
        glu.halves(base, 1), glu.halves(B, 1), glu.halves(bias, 1), strict=True
    ):
        bias_strides = (0, 0) if bias is None else bias_half.stride()
        if S is None:
            factor = (None, None, bias_half, 1.0, 0, base.stride(0), 0, 0, 0, 0)
        else:
            factor = (
                S, B_half, bias_half, float(scaling), S.shape[1], base.stride(0), S.stride(0),
                *B_half.stride(),
            )  # fmt: skip
        found.append(ExpertBranch(half, *factor, *bias_strides))
    return found
