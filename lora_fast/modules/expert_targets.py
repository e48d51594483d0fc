"""Experts that are parameters, among the targets of a conversion: convert adapts layers alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from torch import nn

from ..experts.quantisation import expert_modules, expert_parameters
from ..experts.storage import packed_parameters

_WAY = (
    "experts are parameters, not linear layers: use PEFT's get_peft_model with target_parameters "
    "and lora_fast.accelerate"
)


# Whether a target names what is at a dotted name.
IsNamed = Callable[[str], bool]


def check_experts(model: nn.Module, targets: Sequence[IsNamed]) -> None:
    """Raise ValueError for experts that a target names, if it names no linear layer beside them."""
    paths = _paths(model)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for is_named in targets:
        named = [path for path in paths if is_named(path)]
        if named and not any(map(is_named, linear)):
            raise ValueError(f"target_modules must name linear layers, got {named[0]!r}: {_WAY}")


def warn_of_experts(
    model: nn.Module, targets: Sequence[IsNamed], *, quantised: bool, stacklevel: int
) -> None:
    """Warn of experts that a target names and that get no adapter, and of dense ones in a model
    whose layers are quantised."""
    found = list(expert_modules(model))
    if any(is_named(path) for path in _paths(model) for is_named in targets):
        warnings.warn(f"{found[0][0]} gets no adapter: {_WAY}", stacklevel=stacklevel)
    dense = [path for path, module in found if expert_parameters(module)]
    if quantised and dense:
        warnings.warn(
            f"{dense[0]} stays as it is: quantise experts with lora_fast.quantize_experts",
            stacklevel=stacklevel,
        )


def _paths(model: nn.Module) -> list[str]:
    """The modules of experts, and their parameters."""
    return [
        full
        for path, module in expert_modules(model)
        for name in ("", *expert_parameters(module), *packed_parameters(module))
        for full in [f"{path}.{name}".strip(".")]
    ]
