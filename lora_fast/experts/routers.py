"""The layers that choose experts for a token, or weigh them: found by where they stand."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

# What models call a router, or the gate of a shared expert; a router may hold layers of its own.
_NAMES = frozenset({"gate", "router", "wg", "shared_expert_gate"})


def routers(model: nn.Module) -> list[str]:
    """The dotted names of the routers of `model`, not of the layers inside them."""
    modules = dict(model.named_modules())
    return [name for name in modules if _stands_beside_experts(name, modules)]


def is_router(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the module `name` of ``dict(model.named_modules())`` is a router or part of one."""
    parts = name.split(".")
    ends = range(1, len(parts) + 1)
    return any(_stands_beside_experts(".".join(parts[:end]), modules) for end in ends)


def _stands_beside_experts(name: str, modules: Mapping[str, nn.Module]) -> bool:
    parent, _, last = name.rpartition(".")
    if last not in _NAMES or parent not in modules:
        return False
    siblings = modules[parent].named_children()
    return any(
        "expert" in child or "Expert" in type(module).__name__
        for child, module in siblings
        if child != last
    )
