"""What a method adapts: the layers named, or all linear ones but those where that does no good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import TrainingError
from ..magnitudes import first_of
from .base_model import Base
from .options import MethodOptions

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR = "all-linear"
CLASSIFICATION_HEADS = ("classifier", "score")


def adapts_all_linear(config: MethodOptions) -> bool:
    """Whether nothing else was asked for."""
    return config.target_modules in (None, ALL_LINEAR)


def targets(base: Base, config: MethodOptions) -> str | list[str]:
    """What PEFT takes as ``target_modules``: names, ends of names, or "all-linear" where PEFT's own
    leaves out what it should.

    Raises TrainingError: a name matches no module, or one that is not a linear layer.
    """
    if config.target_modules is not None and not adapts_all_linear(config):
        return _checked(base.model, config.target_modules)
    from ..experts.routers import is_router

    modules = dict(base.model.named_modules())
    linear = [name for name, module in modules.items() if _is_linear(module)]
    routing = {name for name in linear if is_router(name, modules)}
    without_effect = bypassed(base.model)
    if not routing and not without_effect:
        return ALL_LINEAR
    output = base.model.get_output_embeddings()
    left_out = {*without_effect, *CLASSIFICATION_HEADS}
    last = {name: name.rpartition(".")[2] for name in linear}
    shared = {last[name] for name in routing}
    kept = [
        name
        for name in linear
        if name not in routing and last[name] not in left_out and modules[name] is not output
    ]
    return sorted({name if last[name] in shared else last[name] for name in kept})


def _checked(model: nn.Module, wanted: str) -> list[str]:
    """The names in `wanted`, each checked against the model."""
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names:
        raise TrainingError("--target-modules must be all-linear or a list of names, got none")
    for name in names:
        found = [m for key, m in model.named_modules() if f".{key}".endswith(f".{name}")]
        if not found:
            known = sorted(
                {k.rpartition(".")[2] for k, m in model.named_modules() if _is_linear(m)}
            )
            raise TrainingError(
                f"--target-modules: the model has no module {name!r}; it has {', '.join(known)}"
            )
        wrong = next((m for m in found if not _is_linear(m)), None)
        if wrong is not None:
            kind = type(wrong).__name__
            raise TrainingError(f"--target-modules: {name!r} must be a linear layer, got {kind}")
    return names


def expert_parameters_of(base: Base) -> list[str]:
    """What PEFT takes as ``target_parameters``: the weights of all experts.

    Raises TrainingError: the model has none that are parameters.
    """
    from ..experts.quantisation import expert_modules, expert_parameters
    from ..experts.storage import packed_parameters

    found = {
        f"{path.rpartition('.')[2]}.{name}"
        for path, module in expert_modules(base.model)
        for name in (*expert_parameters(module), *packed_parameters(module))
    }
    if not found:
        raise TrainingError(
            f"--experts: {base.name} has no experts that are parameters; leave it out"
        )
    return sorted(found)


def release_routers(model: Any) -> None:
    """Take the adapters off the routers that are no linear layers: for "all-linear", and for names
    of the layers of experts, PEFT adapts their weights in some families."""
    from ..experts.routers import is_router

    config = next(iter(model.peft_config.values()))
    modules = dict(model.named_modules())
    for name, layer in modules.items():
        if hasattr(layer, "parameter_name") and is_router(name, modules):
            parent, _, last = name.rpartition(".")
            setattr(modules[parent], last, layer.get_base_layer())
            config.target_parameters -= {f"{last}.{layer.parameter_name}"}


def about_left_out(model: nn.Module) -> list[str]:
    """Lines about what all-linear leaves out of the adapted `model`."""
    from ..acceleration.expert_summary import about_layers_beside_experts
    from ..experts.routers import routers

    found = []
    if names := bypassed(model):
        multiplied = "the model multiplies with their weights itself"
        found.append(f"all-linear leaves out {', '.join(names)}: {multiplied}")
    if names := routers(model):
        found.append(
            f"all-linear leaves out routers ({first_of(names)}): an adapter there changes which "
            "experts are chosen or how much they count"
        )
    beside = about_layers_beside_experts(model)
    return found if beside is None else [*found, beside]


def about_adapted_experts(base: Base) -> str:
    """What to do where PEFT refuses an adapter on experts, which take no dropout and no DoRA."""
    from ..acceleration.expert_summary import LAYERS_OF_EXPERTS

    taken = {name for names in LAYERS_OF_EXPERTS.values() for name in names}
    output = base.model.get_output_embeddings()
    linear = {  # PEFT has wrapped some of them by now
        name.removesuffix(".base_layer").rpartition(".")[2]: None
        for name, module in base.model.named_modules()
        if _is_linear(module) and module is not output and ".lora_" not in name
    }
    names = ",".join(name for name in linear if name not in taken)
    return f" It adapts experts here; to leave them out: --target-modules {names}, no --experts"


def bypassed(model: nn.Module) -> list[str]:
    """The names of linear layers that all-linear leaves out: the code of their parent
    multiplies with their weights itself, so that an adapter around them would change nothing."""
    from ..modules.weight_reads import multiplies_by_itself

    found = {
        name
        for parent in model.modules()
        for name, layer in parent.named_children()
        if _is_linear(layer) and multiplies_by_itself(parent, name)
    }
    return sorted(found)


def _is_linear(module: nn.Module) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)
