"""Linear layers whose weight the model's code uses directly, so that an adapter has no effect.

Mamba's fused scan and WavLM's attention use ``self.x_proj.weight`` instead of calling the layer.
Reading properties of the tensor (``.weight.dtype``, ``isinstance(….weight, …)``) is harmless.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

from torch import nn

# Properties of a tensor, and functions that read them.
_FACTS = frozenset({"dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad"})
_QUESTIONS = frozenset({"isinstance", "hasattr", "getattr", "type"})
_BEFORE_THE_FORWARD = frozenset({"__init__", "_init_weights", "reset_parameters"})


def multiplies_by_itself(parent: nn.Module, child: str) -> bool:
    """Whether the source of `parent` uses the values of ``self.<child>.weight`` or its bias.

    False if there is no source.
    """
    kind: Any = type(parent)  # hashable, though mypy doubts it
    return child in _used_weights(kind)


@functools.cache
def _used_weights(cls: Any) -> frozenset[str]:
    found: set[str] = set()
    for owner in cls.__mro__:
        if owner.__module__.startswith("torch.nn.") or not issubclass(owner, nn.Module):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except (OSError, TypeError, SyntaxError):
            continue
        for function in tree.body[0].body:  # type: ignore[attr-defined]
            if getattr(function, "name", None) not in _BEFORE_THE_FORWARD:
                _collect(function, found, harmless=False)
    return frozenset(found)


def _collect(node: ast.AST, found: set[str], *, harmless: bool) -> None:
    child = _child_whose_weight_it_is(node)
    if child is not None and not harmless:
        found.add(child)
    asks = isinstance(node, ast.Attribute) and node.attr in _FACTS
    asks = asks or (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _QUESTIONS
    )
    for inner in ast.iter_child_nodes(node):
        _collect(inner, found, harmless=asks)


def _child_whose_weight_it_is(node: ast.AST) -> str | None:
    """NAME if `node` is ``self.NAME.weight`` or ``self.NAME.bias``."""
    if not isinstance(node, ast.Attribute) or node.attr not in ("weight", "bias"):
        return None
    owner = node.value
    if isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name):
        return owner.attr if owner.value.id == "self" else None
    return None
