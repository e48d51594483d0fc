"""The gate of a module of experts as a form that kernels know, by what its code computes.

``_apply_gate`` runs on symbols, and so does the forward of the activation that it calls: rows,
their halves or every other column, limits, an activation, a product. If what comes out is a
:class:`GluForm`, kernels compute it; any other gate is run by its module. No name is known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from torch.nn import functional

from ..backends.torch_gates import GluForm
from ..gated import ACTIVATIONS
from ..gated_mlps.closed_code import PRIMITIVES, Unprovable, is_of_torch, reads_of
from ..replaced import own

_ABSENT: Any = object()
_SILU, _GELU = own(functional.silu, "torch"), torch._C._nn.gelu


class _Code(NamedTuple):
    """A method, the class of its object, and what of the object its result can depend on."""

    function: FunctionType
    cls: type
    attributes: tuple[tuple[str, Any], ...]


class _Partial(NamedTuple):
    """A functools.partial of a function of torch that can be compared."""

    function: Any
    args: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]


def form_of(module: Any) -> GluForm | None:
    """The form of a module's gate, or None if it is none that is known."""
    function = getattr(type(module), "_apply_gate", None)
    if "_apply_gate" in module.__dict__ or not isinstance(function, FunctionType):
        return None
    if functional.silu is not _SILU or functional.gelu is not _GELU:
        return None  # replaced for everyone
    return _form(_code(module, function))


def _code(module: Any, function: FunctionType) -> _Code:
    found = [(name, _attribute(module, name)) for name in function.__code__.co_names]
    return _Code(function, type(module), tuple([(n, v) for n, v in found if v is not _ABSENT]))


def _attribute(module: Any, name: str) -> Any:
    """An attribute of a module as far as symbols take it, in a shape that can be compared; what
    they do not take is absent."""
    value = module.__dict__.get(name, module._modules.get(name, _ABSENT))
    if isinstance(value, nn.Module):
        forward = type(value).forward
        if "forward" in value.__dict__ or not isinstance(forward, FunctionType):
            return _ABSENT
        return _code(value, forward)
    if isinstance(value, functools.partial):
        constants = (*value.args, *value.keywords.values())
        if not is_of_torch(value.func) or not all(isinstance(v, PRIMITIVES) for v in constants):
            return _ABSENT
        return _Partial(value.func, value.args, tuple(value.keywords.items()))
    is_function = isinstance(value, (FunctionType, BuiltinFunctionType)) and is_of_torch(value)
    return value if is_function or isinstance(value, PRIMITIVES) else _ABSENT


@functools.lru_cache(maxsize=64)
def _form(code: _Code) -> GluForm | None:
    try:
        return _as_form(_run(code, _Symbol("rows")))
    except Exception:  # whatever a gate does that symbols do not
        return None


def _run(code: _Code, x: _Symbol) -> Any:
    for _, name, value in reads_of(code.function, code.cls):
        if not is_of_torch(value):
            raise Unprovable(f"reads {name}")
    held = {name: _callable(value) for name, value in code.attributes}
    return code.function(SimpleNamespace(**held), x)


def _callable(value: Any) -> Any:
    if isinstance(value, _Code):
        return functools.partial(_run, value)
    if isinstance(value, _Partial):
        return functools.partial(value.function, *value.args, **dict(value.keywords))
    return value


class _Symbol:
    """A node of an expression: its kind, and what it is of."""

    def __init__(self, kind: str, *parts: Any) -> None:
        self.kind, self.parts = kind, parts

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _computed(function.__name__, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name not in _RULES:
            raise AttributeError(name)
        return functools.partial(_computed, name, self)

    def __mul__(self, other: Any) -> _Symbol:
        return _mul(self, other)

    def __add__(self, other: Any) -> _Symbol:
        return _add(self, other)

    __rmul__, __radd__ = __mul__, __add__

    def __getitem__(self, index: Any) -> _Symbol:
        match index:
            case (e, slice(start=None | 0 | 1, stop=None, step=2)) if e is ...:
                return _Symbol("pairs", self, index[1].start or 0)
        raise Unprovable("takes a part of a tensor")

    def _refuse(self, *_: Any) -> NoReturn:
        raise Unprovable("asks for a value")

    __bool__ = __len__ = __iter__ = __contains__ = _refuse
    __eq__ = __ne__ = _refuse
    __hash__: Any = None


def _computed(name: str, *args: Any, **kwargs: Any) -> Any:
    return _RULES[name](*args, **kwargs)


def _mul(x: _Symbol, other: Any) -> _Symbol:
    if isinstance(other, _Symbol):
        return _Symbol("mul", x, other)
    return _Symbol("scale", x, _number(other))


def _add(x: _Symbol, other: Any) -> _Symbol:
    return _Symbol("add", x, _number(other))


def _clamp(x: _Symbol, min: Any = None, max: Any = None) -> _Symbol:
    return _Symbol("clamp", x, *(None if v is None else _number(v) for v in (min, max)))


def _chunk(x: _Symbol, chunks: int, dim: int = 0) -> tuple[_Symbol, _Symbol]:
    if (chunks, dim) != (2, -1):
        raise Unprovable("other parts than halves of the columns")
    return _Symbol("halves", x, 0), _Symbol("halves", x, 1)


def _activation(name: str) -> Callable[..., _Symbol]:
    def rule(input: _Symbol, inplace: bool = False) -> _Symbol:
        if inplace:
            raise Unprovable("changes a tensor")
        return _Symbol(name, input)

    return rule


def _gelu(input: _Symbol, approximate: str = "none") -> _Symbol:
    return _Symbol({"none": "gelu", "tanh": "gelu_tanh"}[approximate], input)


def _square(x: _Symbol) -> _Symbol:
    if x.kind != "relu":
        raise Unprovable("squares something else than relu")
    return _Symbol("relu2", *x.parts)


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise Unprovable(f"computes with {type(value).__name__}")
    return float(value)


_RULES: dict[str, Callable[..., Any]] = {
    "add": _add, "chunk": _chunk, "clamp": _clamp, "gelu": _gelu, "mul": _mul,
    "relu": _activation("relu"), "sigmoid": _activation("sigmoid"), "silu": _activation("silu"),
    "square": _square,
}  # fmt: skip


def _as_form(h: _Symbol) -> GluForm | None:
    """act(gate) ⊙ up with its factors in any order."""
    if h.kind != "mul":
        return None
    for factor, up in (h.parts, h.parts[::-1]):
        activation, alpha, gate = _acted(factor)
        shift = 0.0
        if up.kind == "add":
            up, shift = up.parts
        gate, lowest, limit = _limits(gate)
        up, *limits = _limits(up)
        whole = gate.kind == up.kind and gate.kind in ("halves", "pairs")
        if not whole or activation not in ACTIVATIONS or alpha <= 0.0 or lowest is not None:
            continue
        (rows, first), (others, second) = gate.parts, up.parts
        if rows is not others or rows.kind != "rows" or (first, second) != (0, 1):
            continue
        if limits == ([None, None] if limit is None else [-limit, limit]) and (limit or 1.0) > 0.0:
            return GluForm(activation, gate.kind == "pairs", limit, alpha, shift)
    return None


def _acted(factor: _Symbol) -> tuple[Any, float, _Symbol]:
    """The activation of a factor, α and the argument; x σ(αx) is SiLU's."""
    if factor.kind == "mul":
        for x, other in (factor.parts, factor.parts[::-1]):
            if other.kind != "sigmoid":
                continue
            (inner,) = other.parts
            if inner is x:
                return "silu", 1.0, x
            if inner.kind == "scale" and inner.parts[0] is x:
                return "silu", inner.parts[1], x
    return factor.kind, 1.0, factor.parts[0] if factor.parts else factor


def _limits(x: _Symbol) -> tuple[_Symbol, float | None, float | None]:
    return x.parts if x.kind == "clamp" else (x, None, None)
