"""Reads the source of a method for calls of its module's children: their arguments and places.

Every value of a local name has a number, and every call a place: the branches around it, and how
often control flow could break before. Calls with the same value at the same place belong together:
the later ones are reached whenever the first is. A branch that the module's attributes decide is no
branch, and its condition is recorded; branches on arguments are, and so are iterations of a loop
and blocks that compute in another mode. Control flow can break at anything that may leave the
method, raise an exception that is caught, or change the module.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from .module_conditions import Condition, decide


class Unreadable(Exception):
    """The reason why the calls of a forward cannot be read from its source."""


class Together(NamedTuple):
    """Children that are called with the same input, in this order, if the conditions hold when the
    first is called; and children that are called in between with other inputs."""

    children: tuple[str, ...]
    conditions: tuple[Condition, ...] = ()
    between: tuple[str, ...] = ()


class Call(NamedTuple):
    """A call of a child: its argument, its place, and its position in the reading."""

    child: str
    value: int
    place: tuple[int, ...]
    step: int


# Blocks that let every exception pass.
_CONTEXTS = frozenset({"autocast", "maybe_autocast", "no_grad", "enable_grad", "set_grad_enabled",
                       "record_function"})  # fmt: skip
_LEAVES, _RAISES = "leaves", "raises"


def bundles(reader: CallReader) -> list[Together]:
    """Children whose every call belongs to calls of the same children in the same order."""
    at: dict[Any, list[Call]] = {}
    for call in reader.calls:
        at.setdefault((call.value, call.place), []).append(call)
    remaining = {call.child for call in reader.calls}
    while True:
        spans = [[call for call in found if call.child in remaining] for found in at.values()]
        named = [tuple(call.child for call in span) for span in spans]
        unclear = {
            child
            for child in remaining
            if len({names for names in named if child in names}) > 1
            or any(names.count(child) > 1 for names in named)
        }
        if not unclear:
            break
        remaining -= unclear
    found_all = []
    for names in dict.fromkeys(names for names in named if len(names) > 1):
        mine = [span for span, its in zip(spans, named, strict=True) if its == names]

        def is_inside(step: int, mine: list[list[Call]] = mine) -> bool:
            return any(span[0].step < step < span[-1].step for span in mine)

        conditions = [condition for step, condition in reader.conditions if is_inside(step)]
        others = [c.child for c in reader.calls if is_inside(c.step) and c.child not in names]
        found_all.append(Together(names, tuple(conditions), tuple(dict.fromkeys(others))))
    return found_all


class CallReader:
    """Walks through a method in execution order. A method of this class that is named after a node
    of the syntax tree reads that node; one of a statement returns how it certainly ends: the method
    is left, an exception is raised, or neither (None)."""

    def __init__(self, function: ast.FunctionDef, module: nn.Module, *, decides: bool) -> None:
        self.calls: list[Call] = []
        self.conditions: list[tuple[int, Condition]] = []
        self._module, self._decides = module, decides
        self._numbers = itertools.count()
        self._branch: tuple[int, ...] = ()
        self._breaks = self._catches = 0
        nodes = list(ast.walk(function))
        if any(isinstance(n, (ast.Yield, ast.YieldFrom, ast.Await, ast.Nonlocal)) for n in nodes):
            raise Unreadable(f"{function.name} yields, or shares its names with other functions")
        arguments = function.args
        everything = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        self._self, *names = [argument.arg for argument in everything]
        self._values = {name: next(self._numbers) for name in names}
        # Attributes that the method itself sets may have changed.
        self._sets = {n.attr for n in nodes if isinstance(n, ast.Attribute) and _is_store(n)}
        self._block(function.body)

    # Statements

    def _block(self, statements: Iterable[ast.stmt]) -> str | None:
        for statement in statements:
            ending: str | None = self._read(statement)
            if ending is not None:
                return ending
        return None

    def _read(self, node: ast.AST) -> Any:
        return getattr(self, type(node).__name__, self._parts)(node)

    def _parts(self, node: ast.AST) -> None:
        for part in ast.iter_child_nodes(node):
            self._read(part)

    def Return(self, node: ast.Return) -> str:
        self._parts(node)
        return _LEAVES

    def Raise(self, node: ast.Raise) -> str:
        return _RAISES

    def Break(self, node: ast.stmt) -> str:
        return _LEAVES

    Continue = Break

    def Assign(self, node: ast.Assign) -> None:
        self._read(node.value)
        for target in node.targets:
            self._assign(target, node.value)

    def AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._read(node.value)
            self._assign(node.target, node.value)

    def AugAssign(self, node: ast.AugAssign) -> None:
        self._read(node.value)
        self._change(node.target)

    def Delete(self, node: ast.Delete) -> None:
        self._forget(node)

    def If(self, node: ast.If) -> str | None:
        self._read(node.test)
        decided = self._decided(node.test)
        if decided is None:
            return self._branches(node.body, node.orelse)
        return self._block(node.body if decided else node.orelse)

    def Match(self, node: ast.Match) -> str | None:
        self._read(node.subject)
        self._forget(node)
        return self._branches(*(case.body for case in node.cases), [])

    def For(self, node: ast.For) -> None:
        self._read(node.iter)
        self._loop(node, node.body, node.orelse)

    def While(self, node: ast.While) -> None:
        self._loop(node, [ast.Expr(node.test), *node.body], node.orelse)

    def _loop(self, loop: ast.stmt, body: list[ast.stmt], otherwise: list[ast.stmt]) -> None:
        self._forget(loop)  # an iteration begins with the values of the previous one
        self._branches(body, [])
        self._branches(otherwise, [])
        self._forget(loop)

    def Try(self, node: Any) -> None:
        handlers = [handler.body for handler in node.handlers]
        self._cut_short(node, [*node.body, *itertools.chain(*handlers), *node.orelse])
        self._branches(node.finalbody, [])

    TryStar = Try

    def With(self, node: ast.With) -> str | None:
        known = True
        for item in node.items:
            context = item.context_expr
            self._read(context)
            known &= isinstance(context, ast.Call) and _name_of(context.func) in _CONTEXTS
            if item.optional_vars is not None:
                self._assign(item.optional_vars, context)
        if known:
            return self._one_branch(node.body)
        self._cut_short(node, node.body)
        return None

    def FunctionDef(self, node: Any) -> None:
        self._other_frame(node)
        self._values[node.name] = next(self._numbers)

    ClassDef = AsyncFunctionDef = FunctionDef

    # Branches

    def _branches(self, *blocks: list[ast.stmt]) -> str | None:
        """Blocks of which one runs. A name keeps its value if all of them leave it unchanged."""
        before, endings, results = self._values, [], []
        for block in blocks:
            self._values = dict(before)
            endings.append(self._one_branch(block))
            if endings[-1] is None:
                results.append(self._values)
        if not results:
            return _LEAVES if _LEAVES in endings else _RAISES
        self._breaks += _LEAVES in endings
        self._values = results[0]
        for name in {name for values in results for name in values}:
            if len({values.get(name) for values in results}) > 1:
                self._values[name] = next(self._numbers)
        return None

    def _one_branch(self, block: list[ast.stmt]) -> str | None:
        around = self._branch
        self._branch = (*around, next(self._numbers))
        ending = self._block(block)
        self._branch = around
        return ending

    def _cut_short(self, statement: ast.stmt, parts: list[ast.stmt]) -> None:
        """Any of `parts` may be the last to run, since an exception may be caught."""
        self._catches += 1
        self._branches(parts, [])
        self._catches -= 1
        self._forget(statement)
        self._breaks += 1

    def _decided(self, test: ast.expr) -> bool | None:
        """The truth of `test`, if the module's attributes decide it."""
        decided = decide(test, self._self, self._module, self._sets) if self._decides else None
        if decided is None:
            return None
        self.conditions += [(next(self._numbers), condition) for condition in decided.relies_on]
        return decided.truth

    # Expressions

    def IfExp(self, node: ast.IfExp) -> None:
        self._read(node.test)
        decided = self._decided(node.test)
        if decided is None:
            self._branches([ast.Expr(node.body)], [ast.Expr(node.orelse)])
        else:
            self._read(node.body if decided else node.orelse)

    def BoolOp(self, node: ast.BoolOp) -> None:
        self._read(node.values[0])
        for value in node.values[1:]:
            self._branches([ast.Expr(value)], [])

    def Compare(self, node: ast.Compare) -> None:
        for part in (node.left, *node.comparators):
            if self._child(part) is None:  # a comparison with None calls no child
                self._read(part)

    def NamedExpr(self, node: ast.NamedExpr) -> None:
        self._read(node.value)
        self._assign(node.target, node.value)

    def Name(self, node: ast.Name) -> None:
        # The module is passed to other code, which may change it.
        self._breaks += self._is_self(node)

    def Attribute(self, node: ast.Attribute) -> None:
        if self._child(node) is not None:
            self._record(node.attr, None)
        elif not self._is_self(node.value) and not self._child(node.value):
            self._read(node.value)
        # Writes through x.data leave no trace on x.
        self._breaks += node.attr == "data"

    def Lambda(self, node: ast.AST) -> None:
        self._other_frame(node)

    ListComp = SetComp = DictComp = GeneratorExp = Lambda

    def _other_frame(self, node: ast.AST) -> None:
        """Code that runs in another frame, if at all."""
        for part in ast.walk(node):
            if self._child(part) is not None:
                self._record(self._child(part), None)

    def Call(self, node: ast.Call) -> None:
        function, child = node.func, self._child(node.func)
        is_method = isinstance(function, ast.Attribute) and self._is_self(function.value)
        if not is_method:
            self._read(function)
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        for argument in arguments:
            self._read(argument)
        if child is not None:
            self._record(child, arguments[0] if node.args and len(arguments) == 1 else None)
            return
        owner = function.value if isinstance(function, ast.Attribute) else None
        if owner is not None and self._child(owner):  # self.q_proj.forward(x)
            self._record(self._child(owner), None)
        name = _name_of(function)
        unknown = is_method and self._is_foreign(name)
        self._breaks += name in ("super", "detach") or unknown
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or any(keyword.arg in ("out", "inplace") for keyword in node.keywords):
            for operand in (*arguments, *([] if owner is None else [owner])):
                self._change(operand)

    def _record(self, child: Any, argument: ast.expr | None) -> None:
        step, known = next(self._numbers), None
        if isinstance(argument, ast.Name) and not self._catches:
            known = self._values.get(argument.id)
        place = (self._breaks, *self._branch)
        self.calls.append(Call(child, step if known is None else known, place, step))

    def _is_self(self, node: ast.AST | None) -> bool:
        return isinstance(node, ast.Name) and node.id == self._self

    def _child(self, node: ast.AST) -> str | None:
        """The name of the child that `node` refers to."""
        if isinstance(node, ast.Attribute) and self._is_self(node.value):
            return node.attr if node.attr in self._module._modules else None
        return None

    def _is_foreign(self, name: str) -> bool:
        """Whether this attribute is a function set on the module that does not come from torch."""
        found = self._module.__dict__.get(name)
        return found is not None and not str(getattr(found, "__module__", "")).startswith("torch")

    # Names

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        targets, values = [target], [value]
        sequences = (ast.Tuple, ast.List)
        if isinstance(target, sequences) and isinstance(value, sequences):
            parts = (*target.elts, *value.elts)
            if len(target.elts) == len(value.elts) and not any(map(_is_starred, parts)):
                targets, values = target.elts, value.elts
        numbers = [self._values.get(v.id) if isinstance(v, ast.Name) else None for v in values]
        for name, number in zip(targets, numbers, strict=True):
            if isinstance(name, ast.Name):
                self._breaks += self._is_self(name)
                self._values[name.id] = next(self._numbers) if number is None else number
            elif isinstance(name, (ast.Attribute, ast.Subscript)):
                self._change(name)
            else:
                self._forget(name)

    def _change(self, node: ast.AST) -> None:
        """Give a new number to a value that is modified, and so to all its names."""
        if isinstance(node, ast.Attribute) and self._child(node):
            self._record(node.attr, None)
        while isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred)):
            node = node.value
        changed = self._values.get(node.id) if isinstance(node, ast.Name) else None
        if changed is not None:
            number = next(self._numbers)
            self._values.update({n: number for n, v in self._values.items() if v == changed})

    def _forget(self, node: ast.AST) -> None:
        """Give a new number to every name that is set in `node`."""
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and _is_store(part):
                self._values[part.id] = next(self._numbers)


def _is_store(node: Any) -> bool:
    return isinstance(node.ctx, (ast.Store, ast.Del))


def _is_starred(node: ast.AST) -> bool:
    return isinstance(node, ast.Starred)


def _name_of(function: ast.expr) -> str:
    """The last part of the name of a called function."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""
