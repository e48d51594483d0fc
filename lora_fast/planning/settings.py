"""The options of a run that determine its memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..methods.options import BATCH_SIZE, MAX_LENGTH, QUANTIZERS, TASKS
from ..methods.table import METHODS, WITH_EXPERTS

FULL = "full"
DTYPES = ("bfloat16", "float16", "float32")
OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "sgd",
)
# Options that turn a config into a model that trains; all but the first two are the method's.
SHAPING = (
    "method",
    "quantize",
    "r",
    "dropout",
    "target_modules",
    "frequencies",
    "virtual_tokens",
    "experts",
)


@dataclass(frozen=True)
class Settings:
    """One run, with the defaults of ``lora-fast train`` on a GPU.

    ``method`` is one of ``lora-fast train --method`` or ``full``; r, dropout (on the input of the
    adapters), target_modules, frequencies and virtual_tokens are None for the method's own
    defaults. ``experts``: adapters on the experts of a mixture, too; None is no. ``quantize`` is
    nf4 if None, and none for ``full``. ``task``: None is causal-lm where a config names an
    architecture that is one, else classification, else the architecture itself. ``batch_size`` and
    ``max_length`` are the task's if None: 8 × 1024, 32 × 256 for classification.

    A 16-bit ``full`` run keeps a float32 master copy of the weights beside its optimizer's float32
    moments: 16 bytes per parameter. Adapters are float32 whatever the dtype. ``fused`` is the model
    under :func:`lora_fast.accelerate`, without it stock PEFT.

    Raises ValueError for an option out of range, or two that contradict each other.
    """

    method: str = "lora"
    quantize: str | None = None
    r: int | None = None
    dropout: float | None = None
    target_modules: str | None = None
    frequencies: int | None = None
    virtual_tokens: int | None = None
    experts: bool | None = None
    dtype: str = "bfloat16"
    task: str | None = None
    batch_size: int | None = None
    max_length: int | None = None
    gradient_checkpointing: bool = False
    optim: str = "adamw_torch"
    fused: bool = True

    def __post_init__(self) -> None:
        _one_of("method", self.method, (*METHODS, FULL))
        if self.quantize is not None:
            _one_of("quantize", self.quantize, QUANTIZERS)
        _one_of("dtype", self.dtype, DTYPES)
        if self.task is not None:
            _one_of("task", self.task, TASKS)
        _one_of("optim", self.optim, OPTIMIZERS)
        for name in ("r", "frequencies", "virtual_tokens", "batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.method == FULL and self.quantize not in (None, "none"):
            raise ValueError("quantize must be none for method full: 4-bit weights cannot train")
        taken = METHODS[self.method].options if self.method != FULL else ()
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name in SHAPING[2:-1]:
            if getattr(self, name) is not None and name not in taken:
                raise ValueError(f"{name} must not be given for method {self.method}")
        if not isinstance(self.experts, bool | None):
            raise TypeError(f"experts must be a bool, got {type(self.experts).__name__}")
        if self.experts and self.method not in WITH_EXPERTS:
            raise ValueError(f"experts must not be given for method {self.method}")
        if self.experts and self.dropout:
            raise ValueError(f"dropout must be 0 with experts, got {self.dropout}")
        if self.gradient_checkpointing and self.method == "prefix":
            raise ValueError(
                "gradient_checkpointing must be off for method prefix: it needs a cache"
            )

    def complete(self, task: str | None) -> Settings:
        """The same run of `task`, with what is None chosen; None is a model of another task."""
        like = task or "causal-lm"
        return replace(
            self,
            task=task,
            quantize=self.quantize or ("none" if self.method == FULL else "nf4"),
            batch_size=self.batch_size or BATCH_SIZE[like],
            max_length=self.max_length or MAX_LENGTH[like],
        )

    @property
    def rank(self) -> int | None:
        """The rank, given or the method's default; None where the method has none."""
        if self.method == FULL:
            return None
        default: Any = METHODS[self.method].options.get("r")
        return self.r or default

    @property
    def adapts_all_linear(self) -> bool:
        """Whether the method adapts every linear layer unless told otherwise, and was not."""
        targets = METHODS[self.method].options.get("target_modules") if self.method != FULL else ""
        return (self.target_modules or targets) == "all-linear"


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
