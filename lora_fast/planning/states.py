"""Bytes of weights, gradients and optimizer state, from parameters that need not exist."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..four_bit import is_four_bit
from ..four_bit.layout import plain_state
from ..methods.targets import CLASSIFICATION_HEADS

# bitsandbytes: optimizers keep smaller tensors in 32 bits, blocks share an absmax, and only larger
# tensors are paged.
MIN_8BIT_ELEMENTS, BLOCK_8BIT, MIN_PAGED_ELEMENTS = 4096, 256, 100_000


def nf4_layers(model: Any) -> dict[int, nn.Module]:
    """The layers that loading in NF4 quantises, by the id of their weight.

    All ``nn.Linear`` except the output layer and classification heads, which transformers and
    ``lora-fast train`` do not quantise.
    """
    output = model.get_output_embeddings()
    return {
        id(layer.weight): layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and layer is not output
        and name.split(".")[0] not in CLASSIFICATION_HEADS
    }


@functools.cache
def nf4_bytes(N: int, K: int) -> int:
    """Bytes of an NF4 weight [N, K] with double quantisation, as bitsandbytes stores it."""
    from ..base_layer.merging import four_bit_tensors
    from ..nf4 import NF4Weight

    weight = NF4Weight.from_dense(torch.empty(N, K, dtype=torch.bfloat16, device="meta"))
    return sum(map(_bytes, four_bit_tensors(weight))) + _bytes(weight.quant_state.code)


def weight_bytes(tensors: Iterable[Tensor], quantised: Container[int]) -> Counter[str]:
    """Bytes of `tensors` by kind: ``nf4``, or the name of their dtype. `quantised`: ids of those
    that loading quantises."""
    found: Counter[str] = Counter()
    for tensor in tensors:
        if id(tensor) in quantised:
            # Experts [E, N, K] are quantised like a matrix.
            found["nf4"] += nf4_bytes(math.prod(tensor.shape[:-1]), tensor.shape[-1])
        elif (state := getattr(tensor, "quant_state", None)) is not None:
            found[str(state.quant_type)] += quantised_bytes(tensor)
        else:
            found[str(tensor.dtype).removeprefix("torch.")] += _bytes(tensor)
    return found


def quantised_bytes(weight: Any) -> int:
    """Bytes of a loaded bitsandbytes weight and its constants."""
    return state_bytes(weight, plain_state(weight.quant_state))


def state_bytes(packed: Tensor, state: Any) -> int:
    """Bytes of packed elements and of the ``quant_state`` that describes them."""
    total = _bytes(packed)
    while state is not None:
        held = (state.absmax, state.code, state.offset)
        total += sum(_bytes(t) for t in held if isinstance(t, Tensor))
        state = state.state2
    return total


def optimizer_bytes(parameters: Iterable[Tensor], optim: str) -> tuple[int, int]:
    """(bytes on the GPU, bytes that may be paged to the host) of the state of `optim`."""
    resident = paged = 0
    for parameter in parameters:
        size = _moment_bytes(parameter, optim)
        if optim.startswith("paged_") and parameter.numel() >= MIN_PAGED_ELEMENTS:
            paged += size
        else:
            resident += size
    return resident, paged


def _moment_bytes(parameter: Tensor, optim: str) -> int:
    n = parameter.numel()
    if optim == "sgd":
        return 0
    if optim.startswith("adamw_torch"):
        return 2 * n * parameter.element_size() + 4  # its count of steps is a float32 tensor
    if optim.endswith("_8bit") and n >= MIN_8BIT_ELEMENTS:
        return 2 * (n + 4 * math.ceil(n / BLOCK_8BIT))
    return 2 * 4 * n


def decode_bytes(model: nn.Module, quantised: dict[int, Any], dtype: torch.dtype) -> int:
    """The buffer into which the largest 4-bit weight is decoded."""
    sizes = [math.prod(layer.weight.shape) for layer in quantised.values()]
    for layer in model.modules():
        state: Any = getattr(layer, "quant_state", None) if is_four_bit(layer) else None
        if state is not None:
            sizes.append(math.prod(state.shape))
    return max(sizes, default=0) * dtype.itemsize


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
