"""What is planned: the options of a run that decide about its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..training.methods import METHODS

FULL = "full"
TASKS = ("causal-lm", "classification")
DTYPES = ("bfloat16", "float16", "float32")
QUANTIZERS = ("none", "nf4")
OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "sgd",
)
# What makes a config into a model that trains; all but the first two are options of the method.
SHAPING = (
    "method",
    "quantize",
    "r",
    "dropout",
    "target_modules",
    "frequencies",
    "virtual_tokens",
)


@dataclass(frozen=True)
class Settings:
    """One run. ``method`` is one of ``lora-fast train --method`` or ``full``; r, dropout (on the
    input of the adapters), target_modules, frequencies and virtual_tokens are None for the method's
    own defaults.

    A 16-bit ``full`` run keeps a float32 master copy of the weights beside its optimizer's float32
    moments: 16 bytes a parameter. Adapters are float32 whatever the dtype. ``fused`` is the model
    under :func:`lora_fast.accelerate`, without it stock PEFT.

    Raises ValueError for an option out of range, or two that contradict each other.
    """

    method: str = "lora"
    quantize: str = "none"
    r: int | None = None
    dropout: float | None = None
    target_modules: str | None = None
    frequencies: int | None = None
    virtual_tokens: int | None = None
    dtype: str = "bfloat16"
    task: str = "causal-lm"
    batch_size: int = 1
    max_length: int = 2048
    gradient_checkpointing: bool = False
    optim: str = "adamw_torch"
    fused: bool = True

    def __post_init__(self) -> None:
        _one_of("method", self.method, (*METHODS, FULL))
        _one_of("quantize", self.quantize, QUANTIZERS)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("task", self.task, TASKS)
        _one_of("optim", self.optim, OPTIMIZERS)
        for name in ("r", "frequencies", "virtual_tokens", "batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.method == FULL and self.quantize != "none":
            raise ValueError("quantize must be none for method full: 4-bit weights cannot train")
        taken = METHODS[self.method].options if self.method != FULL else ()
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name in SHAPING[2:]:
            if getattr(self, name) is not None and name not in taken:
                raise ValueError(f"{name} must not be given for method {self.method}")
        if self.gradient_checkpointing and self.method == "prefix":
            raise ValueError(
                "gradient_checkpointing must be off for method prefix: it needs a cache"
            )

    @property
    def rank(self) -> int | None:
        """The rank, given or the method's default; None where the method has none."""
        if self.method == FULL:
            return None
        default: Any = METHODS[self.method].options.get("r")
        return self.r or default


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
