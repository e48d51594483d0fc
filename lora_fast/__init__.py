"""Fused LoRA and QLoRA training.

    y[M,N] = g[N] ⊙ (x[M,K] W[N,K]ᵀ + s · b[N] ⊙ ((d[R] ⊙ (drop(x) A[R,K]ᵀ)) B[N,R]ᵀ)) + bias[N]

``accelerate(model)`` switches an existing PEFT model to the fused path, ``convert(model, ...)``
adapts a model without PEFT, ``functional.adapted_linear`` is the operation itself.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__

# An installed package holds lora_fast/kernels; in a checkout that folder is the repository's own.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__ = [*__path__, str(Path(__file__).parent.parent)]

if TYPE_CHECKING:
    from . import functional, optim, reference, trainable
    from .acceleration.callback import LoraFastCallback as LoraFastCallback
    from .acceleration.report import Report, report
    from .acceleration.switch import accelerate, decelerate
    from .acceleration.warm_up import warm_up
    from .backends.choice import set_backend
    from .experts.loading import quantize_experts_on_load
    from .experts.quantisation import quantize_experts
    from .files.peft_files import load_adapter, save_adapter
    from .modules.conversion import convert
    from .modules.dora import DoRALinear
    from .modules.lora import LoRALinear
    from .modules.vera import VeRALinear
    from .nf4 import NF4Weight
    from .planning import MemoryPlan, plan

# Resolved on first use, so that `import lora_fast` loads neither Triton nor PEFT nor transformers.
_LAZY = {
    "DoRALinear": "modules.dora",
    "LoRALinear": "modules",
    "LoraFastCallback": "acceleration.callback",
    "MemoryPlan": "planning",
    "NF4Weight": "nf4",
    "Report": "acceleration.report",
    "VeRALinear": "modules.vera",
    "accelerate": "acceleration.switch",
    "convert": "modules.conversion",
    "decelerate": "acceleration.switch",
    "load_adapter": "files.peft_files",
    "plan": "planning",
    "quantize_experts": "experts.quantisation",
    "quantize_experts_on_load": "experts.loading",
    "report": "acceleration.report",
    "save_adapter": "files.peft_files",
    "set_backend": "backends.choice",
    "warm_up": "acceleration.warm_up",
}
_LAZY_MODULES = ("functional", "optim", "reference", "trainable")

# LoraFastCallback needs transformers, without which `from lora_fast import *` must do.
__all__ = [
    "DoRALinear",
    "LoRALinear",
    "MemoryPlan",
    "NF4Weight",
    "Report",
    "VeRALinear",
    "__version__",
    "accelerate",
    "convert",
    "decelerate",
    "functional",
    "load_adapter",
    "optim",
    "plan",
    "quantize_experts",
    "quantize_experts_on_load",
    "reference",
    "report",
    "save_adapter",
    "set_backend",
    "trainable",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LAZY})
