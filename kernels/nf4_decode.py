"""NF4 → dense, in one launch, double quantisation included.

    W[i] = round(code[nibble_i] · absmax[i // blocksize])                     to the wanted dtype

Byte i of the packed weight holds element 2i in its high nibble and 2i + 1 in its low one. The
products are float32 and rounded once: every bit is that of the formula. W can be decoded into wider
rows, with the factor of the low rank in the columns behind it.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .environment import current_arch
from .launch_plans import called, empty, launch
from .launch_policy import DECODE
from .nf4_codes import load_absmax, load_codes, lookup_codes
from .profile import augmented_name, augmented_work, decode_name, decode_work, shown_as
from .tiles import NO_GAINS

# Columns of Q that are written at a time.
_STEP = tl.constexpr(64)


class Scales(NamedTuple):
    """Where the absmax of a packed weight are."""

    absmax_ptr: Any
    absmax2_ptr: Any
    code2_ptr: Any
    BLOCKSIZE: tl.constexpr
    BLOCKSIZE2: tl.constexpr


@triton.jit(**shown_as(decode_name, decode_work))
def nf4_decode(
    packed_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, w_ptr,
    num_bytes, num_elements, num_blocks, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr,
    ROWS: tl.constexpr, SHUFFLES: tl.constexpr,
):  # fmt: skip
    """ROWS quantisation blocks: ROWS × BLOCKSIZE / 2 bytes → ROWS × BLOCKSIZE weights."""
    BYTES: tl.constexpr = BLOCKSIZE // 2
    # One absmax for each row of the tile, loaded and decoded once and not once for each byte.
    blocks = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offset = tl.load(offset_ptr) if offset_ptr is not None else 0.0
    absmax = load_absmax(
        Scales(absmax_ptr, absmax2_ptr, code2_ptr, BLOCKSIZE, BLOCKSIZE2),
        offset,
        blocks,
        blocks < num_blocks,
    )
    first = tl.program_id(0).to(tl.int64) * ROWS
    # Four bytes a thread, and not 16, make the 16 bytes that it stores: loads and stores are both
    # coalesced, and nothing is moved between threads.
    offs = tl.max_contiguous(tl.arange(0, ROWS * BYTES), 4)
    # Of the tile, in 32 bits: one comparison for each access.
    left = tl.minimum(num_bytes - first * BYTES, ROWS * BYTES).to(tl.int32)
    packed = tl.load(packed_ptr + first * BYTES + offs, mask=offs < left, other=0)
    high, low = lookup_codes(packed, load_codes(code_ptr, SHUFFLES), SHUFFLES)
    w = tl.join(high, low).reshape(ROWS, BLOCKSIZE) * absmax[:, None]
    elements = tl.arange(0, ROWS * BLOCKSIZE)
    left = tl.minimum(num_elements - first * BLOCKSIZE, ROWS * BLOCKSIZE).to(tl.int32)
    w = w.to(w_ptr.dtype.element_ty).reshape(ROWS * BLOCKSIZE)
    tl.store(w_ptr + first * BLOCKSIZE + elements, w, mask=elements < left)


@triton.jit
def _load_any_weights(packed_ptr, code_ptr, scales, offset, first, elements, left):
    """Weights first + elements, where blocks do not start with a row: each by itself."""
    inside = elements < left
    index = first + elements
    byte = tl.load(packed_ptr + index // 2, mask=inside, other=0)
    nibble = tl.where(index % 2 == 0, byte >> 4, byte & 0xF).to(tl.int32)
    absmax = load_absmax(scales, offset, index // scales.BLOCKSIZE, inside)
    return tl.load(code_ptr + nibble) * absmax


@triton.jit
def _store_low_rank(w_row, row, B_ptr, gains, scaling, R, first_r, columns, stride_bn, stride_br):
    """s · b dᵀ ⊙ B of one row, in the columns from first_r on; zeros beside it."""
    for r in range(0, columns, _STEP):
        offs = r + tl.arange(0, _STEP)
        offs_r = offs - first_r
        inside = (offs_r >= 0) & (offs_r < R)
        B = tl.load(B_ptr + row * stride_bn + offs_r * stride_br, mask=inside, other=0.0)
        Q = B.to(tl.float32) * tl.cast(scaling, tl.float32)
        if gains.b is not None:
            Q *= tl.load(gains.b + row).to(tl.float32)
        if gains.d is not None:
            Q *= tl.load(gains.d + offs_r, mask=inside, other=0.0).to(tl.float32)
        tl.store(w_row + offs, Q.to(w_row.dtype.element_ty), mask=offs < columns)


@triton.jit(**shown_as(augmented_name, augmented_work))
def nf4_decode_augmented(
    packed_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, B_ptr, gains, w_ptr,
    scaling, K, R, first_r, columns, parts, stride_bn, stride_br, rows, more_rows,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
    SHUFFLES: tl.constexpr,
):  # fmt: skip
    """A part of one row: ROWS quantisation blocks, and with the first part the columns of Q. After
    each `rows` of them, an expert's, there is room for more_rows."""
    BYTES: tl.constexpr = BLOCKSIZE // 2
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    first_k = part * ROWS * BLOCKSIZE
    if B_ptr is None:
        w_row = w_ptr + (row + row // rows * more_rows) * K
    else:
        w_row = w_ptr + row * (K + columns)
    offset = tl.load(offset_ptr) if offset_ptr is not None else 0.0
    scales = Scales(absmax_ptr, absmax2_ptr, code2_ptr, BLOCKSIZE, BLOCKSIZE2)
    elements = tl.arange(0, ROWS * BLOCKSIZE)
    left = tl.minimum(K - first_k, ROWS * BLOCKSIZE)
    if EVEN:
        blocks = part * ROWS + tl.arange(0, ROWS)
        of_row = K // BLOCKSIZE
        absmax = load_absmax(scales, offset, row * of_row + blocks, blocks < of_row)
        offs = tl.max_contiguous(tl.arange(0, ROWS * BYTES), 4)
        first = packed_ptr + (row * K + first_k) // 2
        packed = tl.load(first + offs, mask=offs < left // 2, other=0)
        high, low = lookup_codes(packed, load_codes(code_ptr, SHUFFLES), SHUFFLES)
        w = tl.join(high, low).reshape(ROWS, BLOCKSIZE) * absmax[:, None]
    else:
        w = _load_any_weights(
            packed_ptr, code_ptr, scales, offset, row * K + first_k, elements, left
        )
    w = w.to(w_ptr.dtype.element_ty).reshape(ROWS * BLOCKSIZE)
    tl.store(w_row + first_k + elements, w, mask=elements < left)
    if B_ptr is not None and part == 0:
        _store_low_rank(
            w_row + K, row, B_ptr, gains, scaling, R, first_r, columns, stride_bn, stride_br
        )


def decode(packed, quant_state, dtype):
    """The dense weight [N, K] in `dtype`; packed is uint8, quant_state bitsandbytes' own."""
    w = empty(packed, *quant_state.shape, dtype=dtype)
    if w.numel() == 0:
        return w
    pointers, blocksize, blocksize2 = _scales_of(quant_state)
    num_blocks, rows = quant_state.absmax.numel(), max(1, 2 * DECODE.BLOCK // blocksize)
    launch(
        nf4_decode, (-(-num_blocks // rows),),
        packed, *pointers, w, packed.numel(), w.numel(), num_blocks,
        BLOCKSIZE=blocksize, BLOCKSIZE2=blocksize2, ROWS=rows, SHUFFLES=current_arch() is not None,
        num_warps=DECODE.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return w


def augmented(packed, quant_state, dtype, B, scaling=1.0, *, gains=NO_GAINS, first_r=0, columns):
    """[W | Q | 0] [N, K + columns] in `dtype`: Q = s · b dᵀ ⊙ B [N, R] in the columns from K +
    first_r on, and zeros in the others. Of experts [E, N, K + columns], for B [E · N, R]."""
    *rows, K = quant_state.shape
    w = empty(packed, *rows, K + columns, dtype=dtype)
    _launch_wide(packed, quant_state, w, B, gains, float(scaling), first_r, columns, 1, 0)
    return w


def above(packed, quant_state, dtype, A):
    """[W ; A ; 0] [E, N + P, K] in `dtype` of experts, for A [E, R, K]; P is R padded to 16."""
    (E, N, K) = quant_state.shape
    more_rows = -(-A.shape[1] // 16) * 16
    w = empty(packed, E, N + more_rows, K, dtype=dtype)
    _launch_wide(packed, quant_state, w, None, NO_GAINS, 1.0, 0, 0, N, more_rows)
    called(_put_below, w, A, first=N)
    return w


def _put_below(w, A, first):
    """A and zeros in the rows of w from `first` on."""
    R = A.shape[1]
    w[:, first : first + R] = A
    w[:, first + R :] = 0.0
    return w


def _launch_wide(packed, quant_state, w, B, gains, scaling, first_r, columns, rows, more_rows):
    *N, K = quant_state.shape
    if w.numel() == 0:
        return
    pointers, blocksize, blocksize2 = _scales_of(quant_state)
    blocks = -(-K // blocksize)
    each = min(max(1, 2 * DECODE.BLOCK // blocksize), triton.next_power_of_2(blocks))
    parts = -(-blocks // each)
    launch(
        nf4_decode_augmented, (math.prod(N) * parts,),
        packed, *pointers, B, gains, w, scaling, K, 0 if B is None else B.shape[1], first_r,
        columns, parts, *((0, 0) if B is None else B.stride()), rows, more_rows,
        BLOCKSIZE=blocksize, BLOCKSIZE2=blocksize2, ROWS=each, EVEN=K % blocksize == 0,
        SHUFFLES=current_arch() is not None,
        num_warps=DECODE.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


def _scales_of(quant_state):
    """Pointers to absmax, absmax2, code2, offset (None without double quantisation) and code, and
    both block sizes."""
    state2 = quant_state.state2
    if quant_state.nested:
        nesting, blocksize2 = (state2.absmax, state2.code, quant_state.offset), state2.blocksize
    else:
        nesting, blocksize2 = (None, None, None), 1
    pointers = (quant_state.absmax, *nesting, quant_state.code)
    return pointers, int(quant_state.blocksize), int(blocksize2)
