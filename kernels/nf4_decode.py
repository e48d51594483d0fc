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
    absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, blocks, num_blocks,
    BLOCKSIZE2: tl.constexpr, IS_NESTED: tl.constexpr,
):  # fmt: skip
    """float32 absmax of the quantisation blocks `blocks`."""
    mask = blocks < num_blocks
    absmax = tl.load(absmax_ptr + blocks, mask=mask, other=0)
    if IS_NESTED:
        code = tl.load(code2_ptr + absmax.to(tl.int32))
        scale = tl.load(absmax2_ptr + blocks // BLOCKSIZE2, mask=mask, other=0.0)
        absmax = code * scale + tl.load(offset_ptr)
    return absmax.to(tl.float32)


@triton.jit
def nf4_decode(
    packed_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, w_ptr,
    num_elements, num_blocks, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr,
    IS_NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK packed bytes → 2 · BLOCK weights."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offs = first + tl.arange(0, BLOCK)
    packed = tl.load(packed_ptr + offs, mask=2 * offs < num_elements, other=0)
    # A block of at least 32 elements holds whole bytes: both nibbles share their absmax.
    blocks = (2 * offs) // BLOCKSIZE
    absmax = load_absmax(
        absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, blocks, num_blocks, BLOCKSIZE2, IS_NESTED
    )
    code = tl.load(code_ptr + tl.arange(0, 16))
    high = tl.gather(code, (packed >> 4).to(tl.int32), 0) * absmax
    low = tl.gather(code, (packed & 0xF).to(tl.int32), 0) * absmax
    w = tl.join(high, low).reshape(2 * BLOCK).to(w_ptr.dtype.element_ty)
    elements = 2 * first + tl.arange(0, 2 * BLOCK)
    tl.store(w_ptr + elements, w, mask=elements < num_elements)


def decode(packed, quant_state, dtype):
    """The dense weight [N, K] in `dtype`; packed is flat uint8, quant_state bitsandbytes' own."""
    w = torch.empty(tuple(quant_state.shape), dtype=dtype, device=packed.device)
    if w.numel() == 0:
        return w
    config, nested = pick_decode(), bool(quant_state.nested)
    state2 = quant_state.state2
    nesting = (state2.absmax, state2.code, quant_state.offset) if nested else (None, None, None)
    nf4_decode[(triton.cdiv(packed.numel(), config.BLOCK),)](
        packed, quant_state.absmax, *nesting, quant_state.code, w,
        w.numel(), quant_state.absmax.numel(),
        BLOCKSIZE=int(quant_state.blocksize), BLOCKSIZE2=int(state2.blocksize) if nested else 1,
        IS_NESTED=nested, BLOCK=config.BLOCK, num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return w
