"""Whether a Python function does nothing that a run on symbols does not show.

A run on symbols shows what a function computes from its arguments and from the attributes of its
module. It does not show a counter that the function increments, a list that it appends to, or a
global variable that somebody sets later. So a function runs on symbols only if its code stores
nothing outside of its own variables, and calls and reads nothing but torch, constants, and
functions of which the same holds. Functions that it reaches through attributes are checked when the
symbols are asked for them.
"""

from __future__ import annotations

import dis
import functools
import math
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn


class Unprovable(Exception):
    """Why it cannot be shown what a forward computes."""


# Values that never change.
PRIMITIVES = (type(None), bool, int, float, str, type(...), torch.dtype)
_BUILTINS = frozenset(
    {"super", "isinstance", "hasattr", "getattr", "len", "range", "tuple", "list", "int", "float",
     "bool", "str", "sum", "min", "max", "abs", "zip", "enumerate", "Exception", "ValueError",
     "TypeError", "RuntimeError", "NotImplementedError", "AssertionError"}
)  # fmt: skip
_READS_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
_STORES = frozenset(
    {"STORE_ATTR", "STORE_SUBSCR", "STORE_SLICE", "STORE_GLOBAL", "STORE_NAME", "DELETE_ATTR",
     "DELETE_SUBSCR", "DELETE_GLOBAL", "DELETE_NAME", "DELETE_DEREF"}
)  # fmt: skip
_LEAVES = frozenset(
    {"IMPORT_NAME", "YIELD_VALUE", "RETURN_GENERATOR", "SEND", "GET_AWAITABLE", "LOAD_BUILD_CLASS"}
)

# A mapping, a key, and the value that it had: what a result relies on.
Read = tuple[Mapping[str, Any], str, Any]


def reads_of(function: Any, cls: type) -> list[Read]:
    """The global variables that `function`, of a module of class `cls`, reads.

    Raises Unprovable if it may do more than a run on symbols shows.
    """
    reads: list[Read] = []
    _check(function, cls, reads, set())
    return reads


def is_of_torch(value: Any) -> bool:
    """Whether a function, class or module is torch's own."""
    if isinstance(value, ModuleType):
        name = value.__name__
    elif isinstance(value, (FunctionType, BuiltinFunctionType, type)):
        name = value.__module__
        if name is None:  # torch.mul, a method of a class of torch
            name = getattr(getattr(value, "__self__", None), "__module__", None)
    else:
        return False
    return isinstance(name, str) and name.partition(".")[0] == "torch"


def _check(function: Any, cls: type, reads: list[Read], seen: set[Any]) -> None:
    if not isinstance(function, FunctionType):
        raise Unprovable(f"{_name(function)} is no Python function")
    if function in seen or is_of_torch(function):
        return
    seen.add(function)
    code, scope = function.__code__, function.__globals__
    closure = zip(code.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in closure:
        if name != "__class__":
            _check_value(name, cell.cell_contents, cls, reads, seen)
    names, reason = _globals_of(code)
    if reason is not None:
        raise Unprovable(reason)
    for name in names:
        if name in scope:
            reads.append((scope, name, scope[name]))
            _check_value(name, scope[name], cls, reads, seen)
        elif name not in _BUILTINS:
            raise Unprovable(f"{code.co_qualname} calls {name}")
        if name == "super":
            for inherited in _inherited(code, cls):
                _check(inherited, cls, reads, seen)


def _check_value(name: str, value: Any, cls: type, reads: list[Read], seen: set[Any]) -> None:
    if isinstance(value, PRIMITIVES) or is_of_torch(value) or value is math:
        return
    if not isinstance(value, FunctionType):
        raise Unprovable(f"its forward reads {name}, which may change")
    _check(value, cls, reads, seen)


@functools.cache
def _globals_of(code: CodeType) -> tuple[tuple[str, ...], str | None]:
    """The global names that the code reads, its nested functions' too, and why it may not run."""
    names: list[str] = []
    for instruction in dis.get_instructions(code):
        name, found = instruction.opname, instruction.argval
        if name in _STORES or (name == "STORE_DEREF" and found in code.co_freevars):
            return (), f"{code.co_qualname} changes {found or 'a value'}"
        if name in _LEAVES:
            return (), f"{code.co_qualname} imports or yields"
        if name in _READS_GLOBAL:
            names.append(found)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner, reason = _globals_of(constant)
            if reason is not None:
                return (), reason
            names += inner
    return tuple(dict.fromkeys(names)), None


def _inherited(code: CodeType, cls: type) -> Iterator[FunctionType]:
    """The functions that ``super()`` may reach."""
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for name in code.co_names:
            found = base.__dict__.get(name)
            if isinstance(found, FunctionType) and found.__code__ is not code:
                yield found


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))
