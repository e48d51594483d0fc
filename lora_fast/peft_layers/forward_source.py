"""The children that a module's forward always calls together with one input, from its source.

    query = self.q_proj(hidden_states).view(shape)
    key = self.k_norm(self.k_proj(hidden_states))
    value = self.v_proj(hidden_states)

calls q_proj, k_proj and v_proj together: with the same value of a local variable, and the second
and third whenever the first. :mod:`call_reader` reads the calls; this file finds the source.
"""

from __future__ import annotations
import __future__

import ast
import dis
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from ..gated_mlps.discovery import stock_forward
from .call_reader import CallReader, Together, Unreadable, bundles


def code_of_forward(module: nn.Module) -> CodeType:
    """The code of the forward of `module`, without decorators and hooks.

    Raises Unreadable if it is not written in Python.
    """
    forward: Any = inspect.unwrap(module.__dict__.get("forward", type(module).forward))
    forward = inspect.unwrap(getattr(forward, "__func__", forward))
    if getattr(forward, "passes_on", False):  # of a fused MLP
        forward = inspect.unwrap(stock_forward(module))
    if not isinstance(forward, FunctionType):
        raise Unreadable(f"forward of {type(module).__name__} is no Python function")
    return forward.__code__


def called_together(code: CodeType, module: nn.Module) -> list[Together]:
    """The children of `module` that its method with this code always calls together.

    Conditions on attributes of the module are evaluated now, but only if they matter: children
    called together whatever the attributes depend on none.
    Raises Unreadable if there is no source, or if it is not that of `code`.
    """
    function = _function_of(code)
    open_, decided = (bundles(CallReader(function, module, decides=d)) for d in (False, True))
    whatever = {found.children for found in open_}
    return [f._replace(conditions=()) if f.children in whatever else f for f in decided]


# Of exec and of `python -c`, whose source inspect takes for that of the other from Python 3.13 on.
_NAMELESS = ("<string>", "<stdin>")


@functools.cache
def _function_of(code: CodeType) -> ast.FunctionDef:
    name = code.co_qualname.replace("<locals>.", "")
    if code.co_filename in _NAMELESS:
        raise Unreadable(f"no source of {name}")
    try:
        source = textwrap.dedent(inspect.getsource(code))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError, IndexError) as error:
        raise Unreadable(f"no source of {name}") from error
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        raise Unreadable(f"{name} is no method")
    if not _compiles_to(source, code):
        raise Unreadable(f"source of {name} is not what runs")
    return function


def _compiles_to(source: str, code: CodeType) -> bool:
    """Whether `source` compiles to `code`; the file may have changed since its import."""
    owner = ["_", *code.co_qualname.split(".")][-2]  # names such as __x depend on it
    outer = ", ".join(name for name in code.co_freevars if name != "__class__")
    header = f"def _({outer}):\n class {owner if owner.isidentifier() else '_'}:\n"
    flags = code.co_flags & __future__.annotations.compiler_flag
    text = header + textwrap.indent(source, "  ")
    compiled = compile(text, "<source>", "exec", flags, dont_inherit=True)
    runs = _instructions(code)
    return any(
        found.co_name == code.co_name and _instructions(found) == runs
        for found in _codes_in(compiled)
    )


def _instructions(code: CodeType) -> list[tuple[str, Any]]:
    """The instructions of `code` in order, without those that an import elsewhere in the file
    changes: methods of imported names are called differently, which changes jump lengths."""
    found = []
    for instruction in dis.get_instructions(code):
        name = instruction.opname.replace("LOAD_METHOD", "LOAD_ATTR")
        if name not in ("PUSH_NULL", "PRECALL", "EXTENDED_ARG", "NOP"):
            named = instruction.opcode in _NAMED
            found.append((name, instruction.argval if named else None))
    return found


_NAMED = frozenset((*dis.hasname, *dis.haslocal, *dis.hasfree, *dis.hascompare))


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes_in(constant)
