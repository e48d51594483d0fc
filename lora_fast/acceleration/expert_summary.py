"""Which experts of a mixture train and which are quantised; which layers have none for them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from ..experts.quantisation import expert_modules, expert_parameters
from ..experts.storage import packed_parameters
from ..magnitudes import first_of

# The layers of an expert in checkpoints. Where experts are parameters, PEFT takes these names in
# target_modules for the parameters, whatever else of the model has them.
LAYERS_OF_EXPERTS = {
    "gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"),
    "down_proj": ("down_proj", "w2"),
}


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
    line += f"; {bare} neither adapted nor quantised" if bare else ""
    left = len(_layers_beside_experts(model))
    return line + (f"; no adapter on {left} linear layers that have their names" if left else "")


def about_layers_beside_experts(model: nn.Module) -> str | None:
    """One line on linear layers without an adapter because experts took their names: those of
    shared experts, dense MLPs and gates of attention; None without any."""
    left = _layers_beside_experts(model)
    if not left:
        return None
    names = ", ".join(sorted({name.rpartition(".")[2] for name in left}))
    return (
        f"{first_of(left)}: no adapter, though target_modules had their names: in a model of this "
        f"type PEFT adapts parameters of the experts instead of layers called {names}"
    )


def _layers_beside_experts(model: Any) -> list[str]:
    configs = (getattr(model, "peft_config", None) or {}).values()
    # PEFT writes the name of the parameter alone; whoever writes it by hand says whose it is.
    taken = {p for config in configs for p in getattr(config, "target_parameters", None) or ()}
    names = {name for p in taken for name in LAYERS_OF_EXPERTS.get(p, ())}
    modules = dict(model.named_modules())
    return [
        name
        for name, module in modules.items()
        if name.rpartition(".")[2] in names
        and isinstance(module, nn.Linear)
        and not hasattr(modules[name.rpartition(".")[0]], "modules_to_save")
    ]


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
