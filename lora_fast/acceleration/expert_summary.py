"""Which experts of a mixture train, and which are quantised: a line of the report."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from ..experts.quantisation import expert_modules, expert_parameters
from ..experts.storage import packed_parameters


def about_experts(model: nn.Module, *, will_be_packed: bool = False) -> str | None:
    """One line on the experts that are parameters; None for a model without any.
    `will_be_packed`: loading quantises the dense ones."""
    modules = [module for _, module in expert_modules(model)]
    if not modules:
        return None
    trained = _trained(model)
    names = Counter(name for module in modules for name in trained.get(id(module), ()))
    packed = sum(bool(packed_parameters(m)) and not expert_parameters(m) for m in modules)
    bare = sum(id(m) not in trained and bool(expert_parameters(m)) for m in modules)
    adapted = [f"{name} in {count}" for name, count in sorted(names.items())]
    line = f"experts in {_modules(len(modules))}: "
    line += f"LoRA trains {', '.join(adapted)}" if adapted else "no adapter trains on them"
    if will_be_packed:
        return f"{line}; all in 4 bits as lora-fast train loads them"
    line += f"; {packed or 'none'} in 4 bits"
    return line + (f"; {bare} neither adapted nor quantised" if bare else "")


def _trained(model: nn.Module) -> dict[int, set[str]]:
    """The parameters of each module of experts, by its id, on which an adapter trains."""
    found: dict[int, set[str]] = {}
    wrappers: list[Any] = [m for m in model.modules() if hasattr(m, "parameter_name")]
    for wrapper in wrappers:
        factors = [*wrapper.lora_A.parameters(), *wrapper.lora_B.parameters()]
        if any(p.requires_grad for p in factors):
            base = wrapper.get_base_layer()
            found.setdefault(id(base), set()).add(wrapper.parameter_name)
    return found


def _modules(count: int) -> str:
    return "1 module" if count == 1 else f"{count} modules"
