"""The values of a nibble and an absmax of a 4-bit weight, for every kernel that decodes one.

    code of a nibble: one of 16 float32 numbers, NF4's or FP4's
    absmax[j] = code2[absmax_u8[j]] · absmax2[j // blocksize2] + offset     (double quantisation)

The sum with the offset must not be contracted into a fused multiply-add: kernels that use this are
launched with enable_fp_fusion=False, and every bit is then that of the formula.

On NVIDIA GPUs the 16 codes lie across the lanes of a warp, one in a register of each, and shfl.sync
reads them. With segments of 16 lanes (0x101f) the hardware takes the lowest four bits of the index
alone, so a nibble needs a shift and no mask. Elsewhere tl.gather reads the same table.
"""

import triton
import triton.language as tl

from . import triton_version  # noqa: F401

# Four bytes in $8, the code of the lane in $9: the codes of their high, then of their low nibbles.
_SHUFFLE_FOUR_BYTES = tl.constexpr(
    "{\n.reg .b32 n;\n"
    + "".join(
        f"shr.u32 n, $8, {shift}; shfl.sync.idx.b32 ${out}, $9, n, 0x101f, 0xffffffff;\n"
        for out, shift in enumerate((4, 12, 20, 28, 0, 8, 16, 24))
    )
    + "}"
)
_FLOATS_OUT_BYTES_IN = tl.constexpr(",".join(["=f"] * 8 + ["r"] + ["f"] * 4))
_LANE_MODULO_16 = tl.constexpr("{\nmov.u32 $0, %laneid;\nand.b32 $0, $0, 15;\n}")


@triton.jit
def load_absmax(packed, offset, blocks, mask):
    """float32 absmax of the quantisation blocks `blocks`; 0 where the mask is false."""
    absmax = tl.load(packed.absmax_ptr + blocks, mask=mask, other=0)
    if packed.absmax2_ptr is not None:
        code = tl.load(packed.code2_ptr + absmax.to(tl.int32))
        scale = tl.load(packed.absmax2_ptr + blocks // packed.BLOCKSIZE2, mask=mask, other=0.0)
        absmax = tl.where(mask, code * scale + offset, 0.0)
    return absmax.to(tl.float32)


@triton.jit
def load_codes(code_ptr, SHUFFLES: tl.constexpr):
    """The table: entry lane % 16 in every thread for shuffles, else all 16 as a tensor."""
    if SHUFFLES:
        # A scalar to Triton, which broadcasts it to tiles in place: one register.
        lane = tl.inline_asm_elementwise(_LANE_MODULO_16, "=r", [], tl.int32, True, 1)
        return tl.load(code_ptr + lane)
    else:
        return tl.load(code_ptr + tl.arange(0, 16))


@triton.jit
def lookup_codes(packed, codes, SHUFFLES: tl.constexpr):
    """float32 codes of the high and of the low nibble of every byte."""
    if SHUFFLES:
        return tl.inline_asm_elementwise(
            _SHUFFLE_FOUR_BYTES, _FLOATS_OUT_BYTES_IN, [packed, codes], (tl.float32, tl.float32),
            True, 4,
        )  # fmt: skip
    else:
        index = packed.to(tl.int32).reshape(packed.numel)
        high = tl.gather(codes, index >> 4, 0).reshape(packed.shape)
        return high, tl.gather(codes, index & 0xF, 0).reshape(packed.shape)
