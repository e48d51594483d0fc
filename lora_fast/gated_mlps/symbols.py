"""Symbols for tensors and modules, on which a forward runs without numbers.

A :class:`Symbol` is a node of an expression: the input x, the output of a linear layer, one half of
a symbol, an activation, or a product. A :class:`Stand` stands for a module: it gives the attributes
of the module, notes what it gave, and takes none; called, it is a linear layer of the MLP, or runs
the forward of its module on symbols. Everything else that a forward may do raises Unprovable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .closed_code import PRIMITIVES, Read, Unprovable, is_of_torch, reads_of

MISSING: Any = object()
# Methods of tensors that symbols have, and functions of torch, by name.
_METHODS = frozenset({"chunk", "split", "mul", "multiply", "square", "pow", "relu", "contiguous"})


class Trace:
    """What a run on symbols met: the linear layers called, and what was read."""

    def __init__(self, root: nn.Module, linears: Mapping[str, nn.Module]) -> None:
        self.root, self.linears = root, linears
        self.reads: list[Read] = []
        # Modules whose own forward ran; each call must run it and nothing else.
        self.modules: list[nn.Module] = []
        self.calls: list[Symbol] = []
        self.refused: str | None = None

    def refuse(self, reason: str) -> NoReturn:
        # The forward may catch the exception; the reason stays.
        self.refused = self.refused or reason
        raise Unprovable(reason)

    def run(self, function: Any, module: nn.Module, x: Symbol) -> Any:
        """The result of `function`, a forward of the module, for x."""
        self.reads += self._checked(function, type(module))
        return function(Stand(self, module), x)

    def attribute(self, owner: nn.Module, name: str) -> Any:
        """The attribute of a module as Python finds it, and a note of where it was found."""
        cls, own = type(owner), owner.__dict__
        home = next((base for base in cls.__mro__ if name in base.__dict__), None)
        if home in (nn.Module, object) and name != "forward":
            self.refuse(f"calls {name} of the module")
        static = None if home is None else home.__dict__[name]
        if isinstance(static, property):
            self.reads += [(home.__dict__, name, static), *self._checked(static.fget, cls)]
            return static.fget(Stand(self, owner))  # type: ignore[misc]
        if name in own:
            self.reads.append((own, name, own[name]))
            return self._value(own[name], owner, name)
        self.reads.append((own, name, MISSING))
        if home is not None:
            self.reads.append((home.__dict__, name, static))
            if isinstance(static, FunctionType):
                self.reads += self._checked(static, cls)
                return MethodType(static, Stand(self, owner))
            if isinstance(static, staticmethod):
                static = static.__func__
            elif hasattr(static, "__get__") and not isinstance(static, BuiltinFunctionType):
                self.refuse(f"reads {name}, a {type(static).__name__}")
            return self._value(static, owner, name)
        children: Any = owner._modules
        if name not in children:
            self.refuse(f"reads {name} of the module")
        if owner is not self.root or name not in self.linears:
            self.reads.append((children, name, children[name]))
        return self._value(children[name], owner, name)

    def _value(self, value: Any, owner: nn.Module, name: str) -> Any:
        if isinstance(value, PRIMITIVES):
            return value
        if isinstance(value, nn.Module):
            mine = owner is self.root and self.linears.get(name) is value
            return Stand(self, value, name if mine else None)
        if isinstance(value, MethodType) and value.__self__ is owner:
            self.reads += self._checked(value.__func__, type(owner))
            return MethodType(value.__func__, Stand(self, owner))
        if isinstance(value, (FunctionType, BuiltinFunctionType)):
            if not is_of_torch(value):
                self.reads += self._checked(value, type(owner))
            return value
        if isinstance(value, functools.partial):
            if not all(isinstance(v, PRIMITIVES) for v in (*value.args, *value.keywords.values())):
                self.refuse(f"{name} holds arguments")
            return functools.partial(
                self._value(value.func, owner, name), *value.args, **value.keywords
            )
        if isinstance(value, (Tensor, tuple, list, dict)) or callable(value):
            self.refuse(f"uses {name}, a {type(value).__name__}")
        return Watched(self, value)

    def _checked(self, function: Any, cls: type) -> list[Read]:
        try:
            return reads_of(function, cls)
        except Unprovable as error:
            self.refuse(str(error))


class Symbol:
    """A node: ``kind`` and what it is of. Two nodes are equal only if they are the same."""

    def __init__(self, trace: Trace, kind: str, *parts: Any, width: int | None = None) -> None:
        self._node = (trace, kind, parts, width)

    # For isinstance.
    __class__: Any = property(lambda self: Tensor)

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> Any:
        return NotImplemented  # functions of torch take it for a tensor; Symbolic answers

    def __getattr__(self, name: str) -> Any:
        trace = self._node[0]
        if name not in _METHODS:
            trace.refuse(f"reads {name} of a tensor")
        return functools.partial(compute, trace, name, self)

    def __mul__(self, other: Any) -> Symbol:
        return compute(self._node[0], "mul", self, other)

    __rmul__ = __mul__

    def __pow__(self, exponent: Any) -> Symbol:
        return compute(self._node[0], "pow", self, exponent)

    def __getitem__(self, index: Any) -> Symbol:
        trace = self._node[0]
        match index:
            case (e, slice(start=None, stop=int(stop), step=None)) if e is ...:
                return _half(trace, self, 0, stop)
            case (e, slice(start=int(start), stop=None, step=None)) if e is ...:
                return _half(trace, self, 1, start)
        trace.refuse("takes a part of a tensor that is no half of its columns")


def _refusing(name: str) -> Callable[..., NoReturn]:
    def method(self: Any, *_: Any, **__: Any) -> NoReturn:
        trace: Trace = object.__getattribute__(self, "_node")[0]
        trace.refuse(f"calls {name}")

    return method


_OPERATORS = (
    "add", "radd", "sub", "rsub", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod",
    "matmul", "rmatmul", "rpow", "neg", "pos", "abs", "and", "rand", "or", "ror", "xor", "rxor",
    "invert", "lshift", "rshift", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod",
    "imatmul", "ipow", "iand", "ior", "ixor", "lt", "le", "gt", "ge", "eq", "ne", "bool", "len",
    "iter", "contains", "setitem", "delitem", "int", "float", "index", "hash", "complex",
    "enter", "exit", "call", "copy", "deepcopy", "reduce_ex", "array",
)  # fmt: skip
for _name in _OPERATORS:
    setattr(Symbol, f"__{_name}__", _refusing(_name))


class Watched:
    """An object that a module holds, such as its config: attributes of it may be read."""

    def __init__(self, trace: Trace, of: Any) -> None:
        object.__setattr__(self, "_node", (trace, of))

    def __getattribute__(self, name: str) -> Any:
        trace, of = object.__getattribute__(self, "_node")
        if name == "__class__":
            return type(of)
        value = getattr(of, name, MISSING)
        trace.reads.append((_Attributes(of), name, value))
        if isinstance(value, PRIMITIVES):
            return value
        if value is MISSING or callable(value) or isinstance(value, (Tensor, tuple, list, dict)):
            trace.refuse(f"reads {name} of {type(of).__name__}")
        return Watched(trace, value)


for _name in (*_OPERATORS, "mul", "rmul", "pow", "getitem", "setattr", "delattr"):
    setattr(Watched, f"__{_name}__", _refusing(_name))


class Stand:
    """Stands for a module; for a linear layer of the MLP, if it has a name."""

    def __init__(self, trace: Trace, of: nn.Module, linear: str | None = None) -> None:
        object.__setattr__(self, "_node", (trace, of, linear))

    def __getattribute__(self, name: str) -> Any:
        trace, of, linear = object.__getattribute__(self, "_node")
        if name == "__class__":
            return type(of)
        if linear is not None:
            trace.refuse(f"reads {name} of {linear}")
        return trace.attribute(of, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trace, of, linear = object.__getattribute__(self, "_node")
        if kwargs or len(args) != 1 or type(args[0]) is not Symbol:
            trace.refuse(f"calls {linear or type(of).__name__} with more than one tensor")
        if type(of).__call__ is not nn.Module.__call__:
            trace.refuse(f"calls {type(of).__name__}, which has a call of its own")
        if linear is None:
            trace.modules.append(of)
            return trace.attribute(of, "forward")(*args)
        width = getattr(of, "out_features", None)
        trace.calls.append(Symbol(trace, "linear", linear, args[0], width=width))
        return trace.calls[-1]


for _name in (*_OPERATORS, "mul", "rmul", "pow", "getitem", "setattr", "delattr"):
    if _name != "call":
        setattr(Stand, f"__{_name}__", _refusing(_name))


def functions_of_torch(*names: str) -> list[Read]:
    """The functions of these names, which somebody may replace."""
    homes = (vars(torch.nn.functional), vars(torch))
    return [(home, name, home[name]) for home in homes for name in names if name in home]


class Symbolic(TorchFunctionMode):
    """Takes every function of torch that is called in the block."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(self.trace, function.__name__, *args, **(kwargs or {}))


def compute(trace: Trace, name: str, *args: Any, **kwargs: Any) -> Any:
    """The node of a function of torch, or halves of one."""
    rules: dict[str, Any] = {
        "mul": _product, "multiply": _product, "pow": _power, "square": _square, "chunk": _chunk,
        "split": _split, "silu": _silu, "gelu": _gelu, "relu": _relu, "dropout": _dropout,
        "contiguous": _same,
    }  # fmt: skip
    if name not in rules or not args or type(args[0]) is not Symbol:
        trace.refuse(f"calls {name}")
    trace.reads += functions_of_torch(name)
    try:
        return rules[name](trace, *args, **kwargs)
    except TypeError:
        trace.refuse(f"calls {name} with other arguments")


def _product(trace: Trace, x: Symbol, other: Any) -> Symbol:
    if type(other) is not Symbol:
        trace.refuse("multiplies by a value that is no output of a layer")
    return _square(trace, x) if x is other else Symbol(trace, "mul", x, other)


def _power(trace: Trace, x: Symbol, exponent: Any) -> Symbol:
    if exponent != 2:
        trace.refuse(f"calls pow with {exponent}")
    return _square(trace, x)


def _square(trace: Trace, x: Symbol) -> Symbol:
    _, kind, parts, _ = x._node
    if kind != "relu":
        trace.refuse("squares something else than relu")
    return Symbol(trace, "relu2", *parts)


def _silu(trace: Trace, input: Symbol, inplace: bool = False) -> Symbol:
    return _activation(trace, "silu", input, inplace)


def _gelu(trace: Trace, input: Symbol, approximate: str = "none") -> Symbol:
    return Symbol(trace, "gelu_tanh" if approximate == "tanh" else "gelu", input)


def _relu(trace: Trace, input: Symbol, inplace: bool = False) -> Symbol:
    return _activation(trace, "relu", input, inplace)


def _activation(trace: Trace, name: str, x: Symbol, inplace: bool) -> Symbol:
    if inplace:
        trace.refuse(f"calls {name} in place")
    return Symbol(trace, name, x)


def _dropout(
    trace: Trace, input: Symbol, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Symbol:
    if p > 0.0 and training:
        trace.refuse(f"drops elements with p = {p}")
    return input


def _same(trace: Trace, x: Symbol) -> Symbol:
    return x


def _chunk(trace: Trace, x: Symbol, chunks: int, dim: int = 0) -> tuple[Symbol, Symbol]:
    if (chunks, dim) != (2, -1):
        trace.refuse(f"calls chunk with {chunks} and dim={dim}")
    return Symbol(trace, "half", x, 0), Symbol(trace, "half", x, 1)


def _split(trace: Trace, x: Symbol, split_size: Any, dim: int = 0) -> tuple[Symbol, Symbol]:
    sizes = (split_size,) * 2 if isinstance(split_size, int) else tuple(split_size)
    if len(set(sizes)) != 1 or len(sizes) != 2 or dim != -1:
        trace.refuse(f"calls split with {split_size} and dim={dim}")
    return _half(trace, x, 0, sizes[0]), _half(trace, x, 1, sizes[1])


def _half(trace: Trace, x: Symbol, which: int, size: int) -> Symbol:
    """The first or the second `size` columns of x, all of which they must be together."""
    _, kind, parts, width = x._node
    if kind != "linear" or width is None or 2 * size != width:
        trace.refuse("takes a part of a tensor that is no half of its columns")
    children: Any = trace.root._modules
    trace.reads.append((children, parts[0], children[parts[0]]))  # whose width was read
    return Symbol(trace, "half", x, which)


class _Attributes(Mapping[str, Any]):
    """The attributes of an object, as a mapping."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self._of, name, default)

    def __getitem__(self, name: str) -> Any:
        return getattr(self._of, name)

    def __iter__(self) -> Iterator[str]:
        return iter(dir(self._of))

    def __len__(self) -> int:
        return len(dir(self._of))
