"""Counts of fused calls and fallbacks, from which the report is made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from ..features import is_exporting


@dataclass
class CallCounts:
    """How often one layer ran fused, and how often and why it ran the plain path instead.

    Calls inside torch.compile are not counted, since a changing counter would trigger
    recompilation; recorded are only that there were some, and the reason of the most recent
    fallback.
    """

    fused: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    compiled: bool = False
    compiled_fallback: str | None = None

    def add_fused(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            _set_while_compiling(self, "compiled", True)
        else:
            self.fused += 1

    def add_fallback(self, reason: str) -> None:
        if torch.compiler.is_compiling():
            _set_while_compiling(self, "compiled_fallback", reason)
        else:
            self.fallbacks[reason] += 1

    def restore(self, counts: dict[str, Any]) -> None:
        """Continue from `counts`, the ``vars`` of another object."""
        vars(self).update(counts, fallbacks=Counter(counts["fallbacks"]))

    def by_reason(self) -> dict[str, int]:
        """Fallbacks by reason; those inside torch.compile, which are not counted, appear as one."""
        if self.compiled_fallback is None:
            return dict(self.fallbacks)
        return {**self.fallbacks, f"torch.compile: {self.compiled_fallback}": 1}


def _set_while_compiling(calls: CallCounts, name: str, value: Any) -> None:
    # An exported program does not contain the layer. Dynamo refuses side effects inside a
    # checkpointed region, since they would not be repeated in backward; this one need not be.
    if not is_exporting():
        torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer(
            setattr, calls, name, value
        )
