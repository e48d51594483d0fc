"""The values of a weight in bitsandbytes' plain 4-bit layout, written out element by element."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.functional import get_4bit_type
from torch import Tensor


def formula(packed: Tensor, quant_state: Any, dtype: torch.dtype) -> Tensor:
    """W[i] = round(code[nibble_i] · absmax[i // blocksize]), in `dtype`; packed is flat uint8."""
    state = quant_state
    absmax = _absmax(state)
    return _decoded(packed, absmax, state.blocksize, state.quant_type, state.shape, dtype)


def _decoded(
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    device, packed = packed.device, packed.reshape(-1).view(torch.uint8)
    i = torch.arange(math.prod(shape), device=device)
    byte = packed[i // 2].long()
    nibble = torch.where(i % 2 == 0, byte >> 4, byte & 15)
    code = get_4bit_type(quant_type, device=device)
    product = code[nibble] * absmax.float()[i // blocksize]
    assert product.dtype == torch.float32
    return product.to(dtype).reshape(tuple(shape))


@functools.cache
def bitsandbytes_decodes_by_it() -> torch.library.Library:
    """Let bitsandbytes decode on this CPU what its format says, in stock models, too.

    Its AVX512 kernel gives another weight where K is no multiple of the block size; a yardstick as
    far off as that would let anything pass. The result keeps it so while it lives.
    """
    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an operator is overridden is what is wanted
        library.impl("dequantize_4bit", _decoded, "CPU", allow_override=True)
    return library


def _absmax(quant_state: Any) -> Tensor:
    """absmax[j] = code2[absmax_u8[j]] · absmax2[j // blocksize2] + offset"""
    if not quant_state.nested:
        return quant_state.absmax.float()
    second = quant_state.state2
    j = torch.arange(quant_state.absmax.numel(), device=quant_state.absmax.device)
    scale = second.absmax[j // second.blocksize]
    return second.code[quant_state.absmax.long()] * scale + quant_state.offset
