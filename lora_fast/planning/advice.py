"""Which single change of the settings saves most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from .settings import FULL, Settings

if TYPE_CHECKING:
    from .memory import Change, MemoryPlan

# A smaller rank is worth a look where adapters, gradients and optimizer state weigh this much.
ADAPTER_SHARE = 0.02


def changes(now: MemoryPlan, replanned: Callable[[Settings], MemoryPlan]) -> tuple[Change, ...]:
    """Every single change that saves bytes, the best first."""
    from .memory import Change

    found = []
    for what, settings in _candidates(now):
        saved = now.total - replanned(settings).total
        if saved > 0:
            found.append(Change(what, saved))
    return tuple(sorted(found, key=lambda change: -change.saves))


def _candidates(now: MemoryPlan) -> Iterator[tuple[str, Settings]]:
    s = now.settings
    if s.method == FULL:
        yield "--method lora", replace(s, method="lora")
    elif s.quantize == "none":
        yield "--quantize nf4", replace(s, quantize="nf4")
    if now.activations is not None:
        if not s.gradient_checkpointing and s.method != "prefix":
            yield "--gradient-checkpointing", replace(s, gradient_checkpointing=True)
        if s.batch_size > 1:
            half = s.batch_size // 2
            yield f"--batch-size {half}", replace(s, batch_size=half)
        elif s.max_length > 1:
            half = s.max_length // 2
            yield f"--max-length {half}", replace(s, max_length=half)
    if s.optim.startswith("adamw_torch"):
        for name in ("adamw_8bit", "paged_adamw_8bit"):
            yield f"--optim {name}", replace(s, optim=name)
    rank = s.rank
    adapter = sum(now.parts[name] for name in ("adapters", "gradients", "optimizer state"))
    if rank is not None and rank > 1 and adapter > ADAPTER_SHARE * now.total:
        yield f"--r {rank // 2}", replace(s, r=rank // 2)
