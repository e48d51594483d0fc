"""Modules that take the place of nn.Linear, with parameters named as PEFT names them."""

from .lora import LoRALinear

__all__ = ["LoRALinear"]
