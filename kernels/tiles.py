"""Pieces that the GEMM and the strip kernels share: masked tiles, gains, the dropout mask.

Tiles are named by their index letters, m for rows (tokens), l for a long dimension (K or N), r for
the rank. Offsets into tensors are int64.
"""

import triton
import triton.language as tl

# Words of ticketed_gemm's sync before the first flag: the ticket, and the count of finished CTAs.
FLAGS = tl.constexpr(2)


@triton.jit
def tile_pointers(ptr, offs_0, offs_1, stride_0, stride_1):
    """Pointers to the tile [offs_0, offs_1] of a strided matrix."""
    rows = offs_0.to(tl.int64)[:, None] * stride_0
    return ptr + rows + offs_1.to(tl.int64)[None, :] * stride_1


@triton.jit
def settled(acc):
    """acc, to which no product is adding any more: an instruction that does nothing waits for it.

    Where the operand of a wgmma is made in registers, as dropout makes it, Triton 3.7 leaves the
    last one of an iteration running into the next, and ptxas then runs all of them one by one.
    """
    return tl.inline_asm_elementwise("", "=f,0", [acc], tl.float32, True, 1)


@triton.jit
def load_tile(ptr, offs_0, offs_1, stride_0, stride_1, size_0, size_1):
    """The tile [offs_0, offs_1], zero outside of [0, size_0) × [0, size_1)."""
    mask = (offs_0 < size_0)[:, None] & (offs_1 < size_1)[None, :]
    return tl.load(tile_pointers(ptr, offs_0, offs_1, stride_0, stride_1), mask=mask, other=0.0)


@triton.jit
def load_factor(
    ptr, b_ptr, d_ptr, scaling, offs_l, offs_r, stride_l, stride_r, L, R,
    IS_B: tl.constexpr, HAS_b: tl.constexpr, HAS_d: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A as [K, R], or s · b dᵀ ⊙ B as [N, R], multiplied in float32 and rounded once."""
    tile = load_tile(ptr, offs_l, offs_r, stride_l, stride_r, L, R)
    if IS_B:
        tile = tile.to(tl.float32) * tl.cast(scaling, tl.float32)
        if HAS_b:
            tile *= tl.load(b_ptr + offs_l, mask=offs_l < L, other=0.0).to(tl.float32)[:, None]
        if HAS_d:
            tile *= tl.load(d_ptr + offs_r, mask=offs_r < R, other=0.0).to(tl.float32)[None, :]
    return tile.to(DTYPE)


@triton.jit
def sum_partials(
    partials_ptr, num_partials, offs_m, offs_r, M, R, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Σ_j partials[j, m, r], always in the order of j."""
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for j in range(0, num_partials):
        acc += load_tile(partials_ptr + tl.cast(j, tl.int64) * M * R, offs_m, offs_r, R, 1, M, R)
    return acc
