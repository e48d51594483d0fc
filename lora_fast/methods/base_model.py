"""The loaded base model that a method builds on, and its properties."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.model_source import BUILTIN_PACKAGE, BUILTIN_TITLE

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Base:
    """A loaded base model.

    ``new_modules``, beside the classification head, have no weights in the checkpoint: they train
    in full and are saved. ``skipped``: modules not quantised, None for bitsandbytes' own choice.
    """

    name: str
    model: Any
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    skipped: list[str] | None = None
    new_modules: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What people call the model."""
        built_in = Path(self.name).parent.name == BUILTIN_PACKAGE
        return BUILTIN_TITLE if built_in else Path(self.name).name

    @property
    def quantized(self) -> bool:
        """Whether the linear layers are in 4 bits."""
        return bool(getattr(self.model, "is_loaded_in_4bit", False))
