"""Tied weights that an adapter gives different values."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from .changes import Change

TIED = "tie_word_embeddings"
Groups = Mapping[str, tuple[str, ...]]


def shared_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For every parameter all of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in names.values() for name in group}


def parted(groups: Groups, makers: Mapping[str, Callable[[], Change]]) -> set[str]:
    """The names whose parameter gets different values in different places."""
    found: set[str] = set()
    for name in makers:
        group = groups.get(name, (name,))
        if len(group) > 1 and name not in found and not _change_alike(group, makers):
            found.update(group)
    return found


def _change_alike(group: Iterable[str], makers: Mapping[str, Callable[[], Change]]) -> bool:
    if not all(name in makers for name in group):
        return False
    first, *others = (makers[name]() for name in group)
    return all(first.equals(other) for other in others)


def untied(
    model: Any, names: set[str], rebuild: Callable[[Any], nn.Module]
) -> tuple[Any, set[str]] | None:
    """The config of `model` that gives each of `names` a parameter of its own, and all names that
    have one then; None if no value of ``tie_word_embeddings`` does that and nothing else.

    ``rebuild(config)`` makes the model of a config, on the meta device.
    """
    config = copy.deepcopy(model.config)
    for part in (config, *vars(config).values()):
        if hasattr(part, TIED):
            setattr(part, TIED, False)
    reread = type(config).from_dict(copy.deepcopy(config.to_dict()))  # as from config.json
    if any(_reads_ties(module) for module in model.modules()):
        return None
    alone = {name for name, group in shared_names(rebuild(reread)).items() if len(group) == 1}
    return (config, alone) if names <= alone else None


def _reads_ties(module: nn.Module) -> bool:
    """Whether the forward pass of a module computes something else if weights are tied."""
    try:
        return TIED in inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return True
