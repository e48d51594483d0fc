"""NF4 → dense, in one launch, double quantisation included.

    W[i] = round(code[nibble_i] · absmax[i // blocksize])                     to the wanted dtype
    absmax[j] = code2[absmax_u8[j]] · absmax2[j // blocksize2] + offset     (double quantisation)

Byte i of the packed weight holds element 2i in its high nibble and 2i + 1 in its low one. All
products are float32 and rounded once; the sum with the offset is not contracted into a fused
multiply-add, so every bit equals bitsandbytes' own decoding.
"""

import torch
import triton
import triton.language as tl

from .configs import pick_decode


@triton.jit
def load_absmax(
    absmax_ptr, absmax2_ptr, code2_ptr, offset, blocks, mask,
    BLOCKSIZE2: tl.constexpr, IS_NESTED: tl.constexpr,
):  # fmt: skip
    """float32 absmax of the quantisation blocks `blocks`; 0 where the mask is false."""
    absmax = tl.load(absmax_ptr + blocks, mask=mask, other=0)
    if IS_NESTED:
        code = tl.load(code2_ptr + absmax.to(tl.int32))
        scale = tl.load(absmax2_ptr + blocks // BLOCKSIZE2, mask=mask, other=0.0)
        absmax = tl.where(mask, code * scale + offset, 0.0)
    return absmax.to(tl.float32)


@triton.jit
def nf4_decode(
    packed_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, w_ptr,
    num_bytes, num_elements, num_blocks, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr,
    IS_NESTED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS quantisation blocks: ROWS × BLOCKSIZE / 2 bytes → ROWS × BLOCKSIZE weights."""
    BYTES: tl.constexpr = BLOCKSIZE // 2
    # One absmax for each row of the tile, loaded and decoded once and not once for each byte.
    blocks = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offset = tl.load(offset_ptr) if IS_NESTED else 0.0
    absmax = load_absmax(
        absmax_ptr, absmax2_ptr, code2_ptr, offset, blocks, blocks < num_blocks, BLOCKSIZE2,
        IS_NESTED,
    )  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    offs = first * BYTES + tl.arange(0, ROWS * BYTES)
    packed = tl.load(packed_ptr + offs, mask=offs < num_bytes, other=0).to(tl.int32)
    code = tl.load(code_ptr + tl.arange(0, 16))
    high = tl.gather(code, packed >> 4, 0).reshape(ROWS, BYTES) * absmax[:, None]
    low = tl.gather(code, packed & 0xF, 0).reshape(ROWS, BYTES) * absmax[:, None]
    w = tl.join(high, low).reshape(ROWS * BLOCKSIZE).to(w_ptr.dtype.element_ty)
    elements = first * BLOCKSIZE + tl.arange(0, ROWS * BLOCKSIZE)
    tl.store(w_ptr + elements, w, mask=elements < num_elements)


def decode(packed, quant_state, dtype):
    """The dense weight [N, K] in `dtype`; packed is flat uint8, quant_state bitsandbytes' own."""
    w = torch.empty(tuple(quant_state.shape), dtype=dtype, device=packed.device)
    if w.numel() == 0:
        return w
    config, nested = pick_decode(), bool(quant_state.nested)
    state2 = quant_state.state2
    nesting = (state2.absmax, state2.code, quant_state.offset) if nested else (None, None, None)
    blocksize, num_blocks = int(quant_state.blocksize), quant_state.absmax.numel()
    rows = max(1, 2 * config.BLOCK // blocksize)
    nf4_decode[(triton.cdiv(num_blocks, rows),)](
        packed, quant_state.absmax, *nesting, quant_state.code, w,
        packed.numel(), w.numel(), num_blocks,
        BLOCKSIZE=blocksize, BLOCKSIZE2=int(state2.blocksize) if nested else 1,
        IS_NESTED=nested, ROWS=rows, num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return w
