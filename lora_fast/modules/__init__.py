"""Replacements of nn.Linear, with parameters named as in PEFT."""

from .lora import LoRALinear

__all__ = ["LoRALinear"]
