"""Conditions in a method's source that depend only on attributes of its module."""

from __future__ import annotations

import ast
import copy
from types import CodeType
from typing import NamedTuple

from torch import nn

# Functions that a condition may call.
_BUILTINS = {"hasattr": hasattr, "getattr": getattr, "len": len}


class Condition(NamedTuple):
    """An expression of a module's attributes, with `self` as the module, and its truth."""

    expression: CodeType
    holds: bool

    def is_met(self, module: nn.Module) -> bool:
        try:
            found = eval(self.expression, {"__builtins__": _BUILTINS}, {"self": module})
            return bool(found) is self.holds
        except Exception:  # a missing attribute, or any error of a property
            return False


class Decision(NamedTuple):
    """The truth of a condition, and the conditions on attributes that decide it."""

    truth: bool
    relies_on: tuple[Condition, ...]


def decide(test: ast.expr, owner: str, module: nn.Module, changing: set[str]) -> Decision | None:
    """The truth of `test` in a method whose first argument `owner` is `module`; None if it depends
    on anything but its attributes, or on one of those that are `changing`."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        found = decide(test.operand, owner, module, changing)
        return None if found is None else found._replace(truth=not found.truth)
    if isinstance(test, ast.BoolOp):
        ends = isinstance(test.op, ast.Or)
        parts = [decide(value, owner, module, changing) for value in test.values]
        known = [part for part in parts if part is not None]
        deciding = next((part for part in known if part.truth is ends), None)
        if deciding is not None or len(known) < len(parts):
            return deciding
        return Decision(not ends, tuple(c for part in known for c in part.relies_on))
    if isinstance(test, ast.Constant):
        return Decision(bool(test.value), ())
    if not _is_about(test, owner, changing):
        return None
    expression = ast.Expression(_Renamed(owner).visit(copy.deepcopy(test)))
    code = compile(expression, "<condition>", "eval")
    candidates = (Condition(code, holds) for holds in (True, False))
    met = next((condition for condition in candidates if condition.is_met(module)), None)
    return None if met is None else Decision(met.holds, (met,))


def _is_about(node: ast.expr, owner: str, changing: set[str]) -> bool:
    """Whether an expression consists of attributes of `owner` and constants."""
    match node:
        case ast.Constant():
            return True
        case ast.Attribute(value=ast.Name(id=name), attr=attribute):
            return name == owner and attribute not in changing
        case ast.Attribute(value=value):
            return _is_about(value, owner, changing)
        case ast.Compare(left=left, comparators=others):
            return all(_is_about(part, owner, changing) for part in (left, *others))
        case ast.Call(func=ast.Name(id="len"), args=[value], keywords=[]):
            return _is_about(value, owner, changing)
        case ast.Call(func=ast.Name(id="hasattr" | "getattr"), args=[value, *others], keywords=[]):
            names = [other.value for other in others if isinstance(other, ast.Constant)]
            if isinstance(value, ast.Name):
                mine = value.id == owner and changing.isdisjoint(names[:1])
            else:
                mine = _is_about(value, owner, changing)
            return mine and len(names) == len(others)
    return False


class _Renamed(ast.NodeTransformer):
    """Renames the module to `self`, whatever the method calls it."""

    def __init__(self, owner: str) -> None:
        self._owner = owner

    def visit_Name(self, node: ast.Name) -> ast.Name:
        name = "self" if node.id == self._owner else node.id
        return ast.copy_location(ast.Name(name, ast.Load()), node)
