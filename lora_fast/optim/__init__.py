"""Optimizer extensions for adapters: LoRA+ parameter groups and the Delta-LoRA wrapper."""

from .delta_lora import DeltaLoRA
from .loraplus import loraplus_param_groups

__all__ = ["DeltaLoRA", "loraplus_param_groups"]
