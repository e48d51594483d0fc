"""Keeping bitsandbytes' 4-bit weights in their plain layout on a CPU.

On a CPU with AVX512-BF16 a ``Linear4bit`` that is called in eval mode on an x without a gradient
repacks its weight in place for an inference kernel: the codes of 32 rows interleaved, a bfloat16
absmax [K / blocksize, N], no double quantisation. No gradient flows through such a weight, its
absmax values have lost bits, and an N or K that does not divide raises. So models that lora_fast
loads or converts never repack theirs (:func:`forbid_packing`), and accelerated ones not until
:func:`lora_fast.decelerate` (:func:`suspend_packing`).

A weight that arrives packed is unpacked: its codes exactly, its absmax values unchanged, in
float32. Byte j of the packed rows 32n … 32n + 31, [K / 2, 32], holds their elements 2k and 2k + 1:

    r = 2i      low nibble W[32n + i, 2k]          high nibble W[32n + i + 16, 2k]         i < 16
    r = 2i + 1  low nibble W[32n + i, 2k + 1]      high nibble W[32n + i + 16, 2k + 1]
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import four_bit

# The flag that a Linear4bit checks before it repacks, and the mark of a layer that may repack
# later.
_SWITCH = "support_avx512bf16_for_cpu"
_SUSPENDED = "_lora_fast_packing_suspended"
_ROWS = 32


def forbid_packing(model: nn.Module) -> None:
    """Unpack every 4-bit weight of `model`, in place, and prevent packing from now on."""
    for layer in _layers(model):
        _unpack(layer)
        if getattr(layer, _SWITCH, False):
            setattr(layer, _SWITCH, False)


def suspend_packing(model: nn.Module) -> None:
    """:func:`forbid_packing` until :func:`resume_packing`, of a copy of the model as well."""
    for layer in _layers(model):
        if getattr(layer, _SWITCH, False):
            layer.__dict__[_SUSPENDED] = True
    forbid_packing(model)


def resume_packing(model: nn.Module) -> None:
    """Allow bitsandbytes to pack again the weights held back by :func:`suspend_packing`."""
    for layer in _layers(model):
        if layer.__dict__.pop(_SUSPENDED, False):
            setattr(layer, _SWITCH, True)


def is_plain(state: Any) -> bool:
    """Whether a weight's ``quant_state`` is unpacked."""
    # bitsandbytes drops state2 before it finds that a shape cannot be packed.
    return not getattr(state, "packing_format_for_cpu", False) and hasattr(state, "state2")


def plain_state(state: Any) -> Any:
    """The constants of the plain weight: `state` itself, or an unpacked copy."""
    if is_plain(state):
        return state
    plain = copy.copy(state)
    if getattr(state, "packing_format_for_cpu", False):
        plain.absmax = state.absmax.mT.float().reshape(-1)
        plain.dtype = getattr(state, "original_dtype", state.dtype)
    plain.nested, plain.state2, plain.offset = False, None, None
    plain.packing_format_for_cpu = False
    return plain


def plain_bytes(data: Tensor, state: Any) -> Tensor:
    """The flat uint8 bytes of the plain weight: a view of `data`, unless it is packed."""
    flat = data.view(-1).view(torch.uint8)
    if not getattr(state, "packing_format_for_cpu", False):
        return flat
    N, K = state.shape
    pairs = flat.view(N // _ROWS, K // 2, _ROWS // 2, 2)
    even, odd = pairs.unbind(-1)
    upper = (even & 0xF) << 4 | (odd & 0xF)
    lower = (even & 0xF0) | (odd >> 4)
    return torch.cat([upper, lower], dim=2).transpose(1, 2).reshape(-1)


def _unpack(layer: Any) -> None:
    weight = layer.weight
    state = getattr(weight, "quant_state", None) or layer.quant_state
    if state is None or is_plain(state):
        return
    if getattr(state, "packing_format_for_cpu", False):
        stored = getattr(state, "original_storage_type", None) or torch.uint8
        weight.data = plain_bytes(weight.data, state).view(stored).view(-1, 1)
    # In place, since the weight, its layer and others hold the same state.
    vars(state).update(vars(plain_state(state)))


def _layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if four_bit.is_four_bit(module))
