"""What the arms of a run share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..methods.base_model import Base
from .config import TrainConfig
from .data import Collator, Rows
from .encoding import Example
from .metrics import Scores


@dataclass(frozen=True)
class Experiment:
    """Model, data and options. ``config`` has no unknowns; ``model`` is the one that trains.

    ``steps`` is the number of optimizer steps. ``validation`` holds the examples for early
    stopping, taken from the training examples; empty without it. ``counts``: how the examples were
    used.
    """

    config: TrainConfig
    base: Base
    rows: Rows
    train: list[Example]
    held_out: list[Example]
    collator: Collator
    baselines: dict[str, Scores]
    model: Any
    steps: int
    validation: list[Example] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
