"""PEFT's adapter layers with a fused forward, one file per kind, and its tuners in one file.

The classes add a ``forward`` to PEFT's and little else: parameters, state_dict keys, repr and every
adapter method are PEFT's own, and so is the forward if there is an obstacle. All state is read from
the layer at each call, since adapters may be added, deleted, switched or hot-swapped, and scalings
may become tensors, at any time.
"""

from __future__ import annotations

from torch import nn

from . import (
    adalora_layers,
    delora_layers,
    expert_wrappers,
    ia3_layers,
    lora_layers,
    opaque_layers,
    shared_input,
    vera_layers,
)
from .fused_forward import FusedForward
from .lora_layers import FusedLoRALayer
from .tuners import COVER, TUNER_CLASSES

FUSED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    **lora_layers.FUSED_CLASSES,
    **opaque_layers.FUSED_CLASSES,
    **vera_layers.FUSED_CLASSES,
    **adalora_layers.FUSED_CLASSES,
    **ia3_layers.FUSED_CLASSES,
    **delora_layers.FUSED_CLASSES,
    **expert_wrappers.FUSED_CLASSES,
}
STOCK_CLASSES = {ours: stock for stock, ours in (FUSED_CLASSES | TUNER_CLASSES).items()}

__all__ = [
    "COVER",
    "FUSED_CLASSES",
    "STOCK_CLASSES",
    "TUNER_CLASSES",
    "FusedForward",
    "FusedLoRALayer",
    "shared_input",
]
