"""bitsandbytes' 8-bit layer with its weight decoded for the product: ``decode_int8=True``.

    y = x Wᵀ + bias          W = CB ⊙ SCB / 127

It replaces bitsandbytes' own product, which also rounds x to 8 bits and multiplies columns with
outliers separately. So the results change: they are those of a dense layer with the weight W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..operation.int8_product import int8_product
from .obstacles import module_obstacle, tensor_obstacle

# Devices on which bitsandbytes computes in autocast's dtype while a layer trains.
_DENSE_IN_TRAINING = ("cpu", "xpu")


@dataclass(frozen=True, eq=False)
class DecodedInt8:
    """What a call of the layer computes instead: x [..., K] → y [..., N], in the dtype of x.

    CB [N, K] int8, SCB [N] float32, bias [N]. Under autocast the result has the dtype of x, too,
    unless bitsandbytes' layer leaves it in autocast's: while it trains on a CPU.
    """

    CB: Tensor
    SCB: Tensor
    bias: Tensor | None
    training: bool

    def __call__(self, x: Tensor) -> Tensor:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return int8_product(x, self.CB, self.SCB, self.bias)
        read = x.to(torch.get_autocast_dtype(device))
        y = int8_product(read, self.CB, self.SCB, self.bias)
        return y if self.training and device in _DENSE_IN_TRAINING else y.to(x.dtype)


def decoded(base: Any) -> DecodedInt8 | None:
    """The product of `base` with its decoded weight; None unless `base` is bitsandbytes'
    ``Linear8bitLt``, quantised, and a call of it runs its own forward alone."""
    kind = type(base)
    if (kind.__module__, kind.__qualname__) != ("bitsandbytes.nn.modules", "Linear8bitLt"):
        return None
    state, weight = base.state, base.weight
    # Its first call moves both from the weight to the state.
    SCB = weight.SCB if weight.SCB is not None else state.SCB
    CB = weight.data
    if state.has_fp16_weights or SCB is None or CB.dtype is not torch.int8 or CB.dim() != 2:
        return None
    found = module_obstacle(base, "base layer", kind) or tensor_obstacle(base.bias, "bias")
    return None if found is not None else DecodedInt8(CB, SCB, base.bias, base.training)
