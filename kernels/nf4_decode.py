"""NF4 → dense, in one launch, double quantisation included.

    W[i] = round(code[nibble_i] · absmax[i // blocksize])                     to the wanted dtype

Byte i of the packed weight holds element 2i in its high nibble and 2i + 1 in its low one. The
products are float32 and rounded once: every bit is that of the formula.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .environment import current_arch
from .launch_policy import DECODE
from .nf4_codes import load_absmax, load_codes, lookup_codes
from .profile import decode_name, decode_work, shown_as


class Scales(NamedTuple):
    """Where the absmax of a packed weight are."""

    absmax_ptr: Any
    absmax2_ptr: Any
    code2_ptr: Any
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
        Scales(absmax_ptr, absmax2_ptr, code2_ptr, BLOCKSIZE2), offset, blocks, blocks < num_blocks
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


def decode(packed, quant_state, dtype):
    """The dense weight [N, K] in `dtype`; packed is flat uint8, quant_state bitsandbytes' own."""
    w = torch.empty(tuple(quant_state.shape), dtype=dtype, device=packed.device)
    if w.numel() == 0:
        return w
    config, nested = DECODE, bool(quant_state.nested)
    state2 = quant_state.state2
    nesting = (state2.absmax, state2.code, quant_state.offset) if nested else (None, None, None)
    blocksize, num_blocks = int(quant_state.blocksize), quant_state.absmax.numel()
    shuffles = current_arch() is not None
    rows = max(1, 2 * config.BLOCK // blocksize)
    nf4_decode[(-(-num_blocks // rows),)](
        packed, quant_state.absmax, *nesting, quant_state.code, w,
        packed.numel(), w.numel(), num_blocks,
        BLOCKSIZE=blocksize, BLOCKSIZE2=int(state2.blocksize) if nested else 1,
        ROWS=rows, SHUFFLES=shuffles,
        num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return w
