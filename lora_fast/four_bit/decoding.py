"""4-bit weights decoded by the formula that defines them.

    W[i] = round(code[nibble_i] · absmax[i // blocksize])        i over the flattened weight [N, K]

Byte i holds element 2i in its high nibble and 2i + 1 in its low one; code · absmax is a float32
product, rounded once to the wanted dtype. On a CPU one lookup gives both codes of a byte, and
bitsandbytes' kernels are not used: with AVX512 they count blocks from the start of every row, which
decodes another weight if K is not a multiple of the block size. Elsewhere they compute this.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# QLoRA (Dettmers et al. 2023), appendix E, in float32; 4-bit floats of bitsandbytes (sign, 2 bits
# of exponent, 1 of mantissa), scaled to 1.
CODES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
        *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
        *(0.0, -0.0052083334885537624, -0.6666666865348816, -1.0),
        *(-0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
    ),
}
# Elements at a time: their codes stay in the second-level cache until they are multiplied.
_CHUNK = 1 << 17


def absmax_of(quant_state: Any) -> Tensor:
    """float32 absmax of every block of a plain weight, double quantisation undone:

    absmax[j] = code2[absmax_u8[j]] · absmax2[j // blocksize2] + offset
    """
    if not quant_state.nested:
        return quant_state.absmax.float()
    second = quant_state.state2
    codes = second.code.index_select(0, quant_state.absmax.flatten().int())
    scales = second.absmax.repeat_interleave(second.blocksize)[: codes.numel()]
    return codes.mul_(scales).add_(quant_state.offset).view(quant_state.absmax.shape)


def decode(
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
    shape: Sequence[int],
) -> Tensor:
    """The dense weight of `shape` in `dtype`, of NF4 or FP4, on the device of `packed`, which is
    uint8; absmax is float32, one for each block of the flattened weight. float64 is the exact image
    of the float32 product."""
    if packed.device.type != "cpu":
        return _by_bitsandbytes(packed, absmax, blocksize, quant_type, dtype, shape)
    elements = math.prod(shape)
    pairs = _pairs(quant_type)
    out = torch.empty(elements, dtype=dtype, device="cpu")
    packed = packed.view(-1)
    step = blocksize * max(1, _CHUNK // blocksize)
    for first in range(0, elements, step):
        last = min(first + step, elements)
        index = packed[first // 2 : (last + 1) // 2].int()
        values = pairs.index_select(0, index).view(torch.float32)[: last - first]
        scales = absmax[first // blocksize : -(-last // blocksize)]
        whole = values.numel() // blocksize * blocksize
        values[:whole].view(-1, blocksize).mul_(scales[: whole // blocksize, None])
        if whole < last - first:
            values[whole:].mul_(scales[-1])
        out[first:last].copy_(values)
    return out.view(*shape)


def _by_bitsandbytes(
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
    shape: Sequence[int],
) -> Tensor:
    import bitsandbytes  # noqa: F401 - registers the operator

    known = (torch.float32, torch.float16, torch.bfloat16)
    direct = dtype if dtype in known else torch.float32
    dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
    found: Tensor = dequantize(packed, absmax, blocksize, quant_type, list(shape), direct)
    return found.to(dtype)


@functools.cache
def _pairs(quant_type: str) -> Tensor:
    """[256]: float32 codes of the high and the low nibble of a byte, together as an int64."""
    code = torch.tensor(CODES[quant_type], dtype=torch.float32, device="cpu")
    both = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)
    return both.view(torch.int64).view(-1)
