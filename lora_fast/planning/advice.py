"""The single change of the settings that saves most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import nn

from ..acceleration.report import adapted_layers
from .memory_plan import Change, MemoryPlan
from .settings import FULL, Settings

# A smaller rank is suggested if adapters, gradients and optimizer state weigh this much.
ADAPTER_SHARE = 0.02


def changes(
    now: MemoryPlan, model: nn.Module, replanned: Callable[[str, Settings], MemoryPlan]
) -> tuple[Change, ...]:
    """Every single change that saves bytes, the best first. `model` is the one that trains;
    ``replanned(what, settings)`` plans a change."""
    found = []
    for what, settings in _candidates(now, model):
        saved = now.total - replanned(what, settings).total
        if saved > 0:
            found.append(Change(what, saved))
    return tuple(sorted(found, key=lambda change: -change.saves))


def _candidates(now: MemoryPlan, model: nn.Module) -> Iterator[tuple[str, Settings]]:
    s = now.settings
    batch_size, max_length = s.batch_size or 1, s.max_length or 1
    if s.method == FULL:
        yield "--method lora", replace(s, method="lora")
    elif s.quantize == "none":
        yield "--quantize nf4", replace(s, quantize="nf4")
    if now.activations is not None:
        if not s.gradient_checkpointing and s.method != "prefix":
            yield "--gradient-checkpointing", replace(s, gradient_checkpointing=True)
        if batch_size > 1:
            half = batch_size // 2
            yield f"--batch-size {half}", replace(s, batch_size=half)
        elif max_length > 1:
            half = max_length // 2
            yield f"--max-length {half}", replace(s, max_length=half)
    if s.optim.startswith("adamw_torch"):
        for name in ("adamw_8bit", "paged_adamw_8bit"):
            yield f"--optim {name}", replace(s, optim=name)
    rank = s.rank
    adapter = sum(now.parts[name] for name in ("adapters", "gradients", "optimizer state"))
    if rank is not None and rank > 1 and adapter > ADAPTER_SHARE * now.total:
        yield f"--r {rank // 2}", replace(s, r=rank // 2)
    names = _of_attention(model) if s.adapts_all_linear else ()
    if names:
        targets = ",".join(names)
        yield f"--target-modules {targets}", replace(s, target_modules=targets)


def _of_attention(model: nn.Module) -> tuple[str, ...]:
    """The names of adapted layers that are in attention alone, if there are others beside them."""
    adapted = {path for path, _ in adapted_layers(model)}
    inside: dict[str, None] = {}
    outside: set[str] = set()
    others = False
    for path, _ in model.named_modules():
        *parents, name = path.split(".")
        attends = any("attn" in part or "attention" in part for part in parents)
        if path in adapted and attends:
            inside[name] = None
        else:  # a name means every module that is called so
            outside.add(name)
            others = others or path in adapted
    return tuple(name for name in inside if name not in outside) if others else ()
