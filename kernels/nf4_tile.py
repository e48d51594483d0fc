"""A tile of an NF4 weight, decoded in registers: the route that never stores the dense weight.

    W[n, k] = round(code[nibble of element nK + k] · absmax[(nK + k) // blocksize])

A byte holds two neighbours of one row, so rows must start on whole bytes: K is even. The products
are float32 and rounded once: every bit is that of the formula.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .nf4_codes import load_absmax, lookup_codes

# What `switches` says of a dense weight.
_DENSE = {"IS_NF4": False, "BLOCKSIZE": 1, "BLOCKSIZE2": 1, "SHARING": 1}


@dataclass(frozen=True)
class Nf4Operand:
    """A packed weight [N, K] for ticketed_gemm; quant_state is bitsandbytes' own."""

    packed: torch.Tensor
    quant_state: Any

    @property
    def shape(self):
        return tuple(self.quant_state.shape)

    def pointers(self):
        """packed, absmax, absmax2, code2, offset (None without double quantisation), code."""
        state = self.quant_state
        nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
        return (self.packed, state.absmax, *(nested or (None, None, None)), state.code)

    def switches(self, block_columns):
        """The switches of ticketed_gemm for tiles that start at multiples of block_columns."""
        state = self.quant_state
        blocksize = int(state.blocksize)
        return {
            "BLOCKSIZE": blocksize,
            "BLOCKSIZE2": int(state.state2.blocksize) if state.nested else 1,
            "SHARING": math.gcd(self.shape[1], blocksize, block_columns),
        }


def weight_arguments(w, config, is_grad):
    """Pointers, strides and switches of a dense or a packed weight w [N, K] for ticketed_gemm.

    The strides are those of w for the gradient, of its transpose for the forward pass; in bytes for
    packed rows.
    """
    if isinstance(w, Nf4Operand):
        strides = (w.shape[1] // 2, 1)
        columns = config.BLOCK_N if is_grad else config.BLOCK_K
        pointers, switches = w.pointers(), {"IS_NF4": True, **w.switches(columns)}
    else:
        strides, switches = w.stride(), _DENSE
        pointers = (w, None, None, None, None, None)
    return pointers, strides if is_grad else strides[::-1], switches


@triton.jit
def decode_tile(
    packed, codes, absmax, SHARING: tl.constexpr, DTYPE: tl.constexpr, TARGET: tl.constexpr
):
    """packed [ROWS, COLUMNS / 2], absmax [ROWS, COLUMNS / SHARING] → W [ROWS, COLUMNS]."""
    ROWS: tl.constexpr = packed.shape[0]
    COLUMNS: tl.constexpr = 2 * packed.shape[1]
    high, low = lookup_codes(packed, codes, TARGET.SHUFFLES)
    # Joined before they are rounded: one conversion then rounds a pair into one register.
    w = tl.join(high, low).reshape(ROWS, COLUMNS // SHARING, SHARING) * absmax[:, :, None]
    w = w.to(DTYPE).reshape(ROWS, COLUMNS)
    if TARGET.MMA_SYNC:
        # A move that costs nothing and hides the bytes. Triton 3.7.1 would see that an operand
        # comes from 8-bit loads, choose mma.sync's layout for them, and so put one register move or
        # more for each product into the loop (A100: 580 instructions instead of 293).
        w = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [w], w.dtype, False, 2)
    return w


@triton.jit
def packed_pointers(
    packed_ptr, row_block, column_block, row_bytes, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Pointers to the bytes of a tile, counted in tiles."""
    rows = (row_block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    offs_byte = column_block * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    return packed_ptr + rows[:, None] * row_bytes + offs_byte[None, :]


@triton.jit
def load_nf4_tile(
    ptrs, member, offset, codes, row_block, column_block, rows, columns, row_bytes,
    EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr, DTYPE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """W [ROWS, COLUMNS] of a member in DTYPE, zero outside of [0, rows) × [0, columns).

    ptrs are the packed_pointers of the tile. From every multiple of SHARING on, as many neighbours
    share one absmax. EVEN_*: the tiles end where the matrix does.
    """
    ROWS: tl.constexpr = ptrs.shape[0]
    BYTES: tl.constexpr = ptrs.shape[1]
    SHARING: tl.constexpr = member.SHARING
    offs_row = row_block * ROWS + tl.arange(0, ROWS)
    offs_byte = column_block * BYTES + tl.arange(0, BYTES)
    offs_shared = column_block * (2 * BYTES) + SHARING * tl.arange(0, 2 * BYTES // SHARING)
    # Columns in bytes, so that the compiler sees that 16 neighbours are inside together.
    byte_mask, mask = (offs_byte < row_bytes)[None, :], (offs_shared < columns)[None, :]
    if EVEN_COLUMNS:
        byte_mask, mask = (offs_row < rows)[:, None], (offs_row < rows)[:, None]
    elif not EVEN_ROWS:
        byte_mask, mask = byte_mask & (offs_row < rows)[:, None], mask & (offs_row < rows)[:, None]
    packed = tl.load(ptrs, mask=byte_mask, other=0)
    # Unsigned, so that dividing by a power of two is one shift; blocks can be counted in 32 bits.
    elements = offs_row.to(tl.uint64)[:, None] * columns + offs_shared.to(tl.uint64)[None, :]
    blocks = (elements // member.BLOCKSIZE).to(tl.uint32)
    absmax = load_absmax(member, offset, blocks, mask)
    return decode_tile(packed, codes, absmax, SHARING, DTYPE, TARGET)
