"""What a weight in bitsandbytes' plain 4-bit layout stands for, written out element by element."""

from __future__ import annotations

import math
from typing import Any

import torch
from bitsandbytes.functional import get_4bit_type
from torch import Tensor


def formula(packed: Tensor, quant_state: Any, dtype: torch.dtype) -> Tensor:
    """W[i] = round(code[nibble_i] · absmax[i // blocksize]), in `dtype`; packed is flat uint8."""
    device = packed.device
    shape, blocksize = quant_state.shape, quant_state.blocksize
    i = torch.arange(math.prod(shape), device=device)
    byte = packed[i // 2].long()
    nibble = torch.where(i % 2 == 0, byte >> 4, byte & 15)
    code = get_4bit_type(quant_state.quant_type, device=device)
    product = code[nibble] * _absmax(quant_state)[i // blocksize]
    assert product.dtype == torch.float32
    return product.to(dtype).reshape(shape)


def _absmax(quant_state: Any) -> Tensor:
    """absmax[j] = code2[absmax_u8[j]] · absmax2[j // blocksize2] + offset"""
    if not quant_state.nested:
        return quant_state.absmax.float()
    second = quant_state.state2
    j = torch.arange(quant_state.absmax.numel(), device=quant_state.absmax.device)
    scale = second.absmax[j // second.blocksize]
    return second.code[quant_state.absmax.long()] * scale + quant_state.offset
