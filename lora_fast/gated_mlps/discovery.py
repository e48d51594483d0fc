"""Gated MLPs among modules, by what their forward computes.

    y = down(act(gate(x)) ⊙ up(x))          or, with gate and up in one layer,
    gate, up = gate_up(x).chunk(2, dim=-1); y = down(act(gate) ⊙ up)

with the factors in any order and act one of SiLU, GELU (erf, tanh), ReLU and ReLU². The forward of
the module runs on symbols (:mod:`symbols`); nothing is computed, and no name is known, except those
of Liger's classes, whose forward is a kernel.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple

from torch import nn

from ..gated import ACTIVATIONS, Activation
from .closed_code import PRIMITIVES, Read, Unprovable
from .symbols import MISSING, Symbol, Symbolic, Trace, functions_of_torch

# Attribute of a fused MLP: its state.
STATE = "_lora_fast_mlp"
# Functions that compute activations.
_OF_ACTIVATIONS = ("silu", "gelu", "relu", "square")
# A forward of Liger, and what it computes: activation, gate, up, down.
_LIGER: dict[str, tuple[Activation, str, str | None, str]] = {
    "LigerSwiGLUMLP": ("silu", "gate_proj", "up_proj", "down_proj"),
    "LigerQwen3MoeSwiGLUMLP": ("silu", "gate_proj", "up_proj", "down_proj"),
    "LigerHunyuanV1SwiGLUMLP": ("silu", "gate_proj", "up_proj", "down_proj"),
    "LigerBlockSparseTop2MLP": ("silu", "w1", "w3", "w2"),
    "LigerGEGLUMLP": ("gelu_tanh", "gate_proj", "up_proj", "down_proj"),
    "LigerPhi3SwiGLUMLP": ("silu", "gate_up_proj", None, "down_proj"),
}


class GatedMLP(NamedTuple):
    """The children of a module that are gate, up and down; without `up`, the output of `gate` holds
    both, side by side."""

    activation: Activation
    gate: str
    up: str | None
    down: str

    @property
    def names(self) -> tuple[str, ...]:
        up = () if self.up is None else (self.up,)
        return (self.gate, *up, self.down)


class Proof(NamedTuple):
    """What the forward of a module was found to compute, or why that is unknown; as long as
    everything that it read is what it was. `modules` must run their own forward alone; `names` are
    those of the linear layers."""

    mlp: GatedMLP | None
    reason: str | None
    own: dict[str, Any]
    reads: tuple[Read, ...] = ()
    modules: tuple[nn.Module, ...] = ()
    names: tuple[str, ...] = ()

    def holds(self, module: nn.Module) -> bool:
        """Whether another proof for `module` would give the same."""
        if self.own is not module.__dict__:
            return False
        for mapping, key, value in self.reads:
            found = mapping.get(key, MISSING)
            if found is not value and not _are_equal(found, value):
                return False
        return True


def prove(module: nn.Module, linears: dict[str, Any]) -> Proof:
    """What the forward of `module` computes with its children `linears`, by name.

    Hooks are left out: those of the module do not change what its forward computes, and those of
    its children are the caller's to look for.
    """
    trace = Trace(module, linears)
    mlp: GatedMLP | None = None
    try:
        function = forward_of(module, trace.reads)
        mlp = _of_liger(function)
        if mlp is None:
            mlp = _on_symbols(trace, function, module)
    except Exception as error:
        reason = trace.refused or str(error)
        # One in the place of another may be the reason.
        trace.reads += functions_of_torch(*_OF_ACTIVATIONS)
        known = trace.refused is not None or isinstance(error, Unprovable)
        trace.refused = reason if known else f"raises {type(error).__name__}: {reason}"
    if trace.refused is not None:
        mlp = None
    reads, modules = _distinct(trace.reads), tuple(dict.fromkeys(trace.modules))
    names = () if mlp is None else mlp.names
    return Proof(mlp, trace.refused, module.__dict__, reads, modules, names)


def forward_of(module: nn.Module, reads: list[Read] | None = None) -> Any:
    """The function that a call of `module` runs between its hooks, except ours.

    Raises Unprovable if it is not a function of the module's class, unless it is Liger's.
    """
    reads = [] if reads is None else reads
    slot = slot_of(module)
    found = module.__dict__.get(slot, MISSING)
    reads.append((module.__dict__, slot, found))
    if found is MISSING or getattr(found, "__func__", None) is type(module).forward:
        return stock_forward(module, reads)
    if STATE not in module.__dict__ and is_bound_by_liger(module, found):
        return found.__func__
    raise Unprovable("forward of the module replaced")


def stock_forward(module: nn.Module, reads: list[Read] | None = None) -> Any:
    """The forward that a fused MLP falls back to: Liger's in the place of its own, or that of its
    class before; of any other module that of its class."""
    liger = getattr(module.__dict__.get(STATE), "liger", None)
    if liger is not None:
        return liger
    for home in type(module).__mro__:
        function = home.__dict__.get("forward")
        if function is not None and not getattr(function, "passes_on", False):
            if reads is not None:
                reads.append((home.__dict__, "forward", function))
            return function
    raise Unprovable("it has no forward")


def slot_of(module: nn.Module) -> str:
    """The attribute of `module` that holds the forward which its hook for a ``device_map`` calls,
    or that would hold its own."""
    hooked = "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__
    return "_old_forward" if hooked else "forward"


def is_bound_by_liger(module: nn.Module, forward: Any) -> bool:
    """Whether `forward` is one of Liger's that was set on `module`."""
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        return False
    return _of_liger(forward.__func__) is not None


def _of_liger(function: Any) -> GatedMLP | None:
    package, _, _ = getattr(function, "__module__", "").partition(".")
    cls, _, name = getattr(function, "__qualname__", "").rpartition(".")
    if package == "liger_kernel" and name == "forward" and cls in _LIGER:
        return GatedMLP(*_LIGER[cls])
    return None


def _on_symbols(trace: Trace, function: Any, module: nn.Module) -> GatedMLP:
    x = Symbol(trace, "input")
    with Symbolic(trace):
        y = trace.run(function, module, x)
    found = _as_mlp(y, x)
    if found is None:
        trace.refuse("its forward is not down(act(gate(x)) * up(x))")
    mlp, used = found
    if {id(symbol) for symbol in used} != {id(symbol) for symbol in trace.calls}:
        trace.refuse("its forward calls a layer more than once, or without need")
    return mlp


def _as_mlp(y: Any, x: Symbol) -> tuple[GatedMLP, list[Symbol]] | None:
    """The MLP whose output is the symbol y, and its linear layers."""
    down, h = _parts(y, "linear")
    kind, factors = _node(h)
    if kind != "mul":
        return None
    for g, u in (factors, factors[::-1]):
        activation, inner = _node(g)
        if activation not in ACTIVATIONS:
            continue
        gate, up = inner[0], u
        if _node(gate)[0] == _node(up)[0] == "half":
            (whole, first), (other, second) = _parts(gate, "half"), _parts(up, "half")
            name, source = _parts(whole, "linear")
            if whole is other and (first, second) == (0, 1) and source is x and name != down:
                return GatedMLP(activation, name, None, down), [whole, y]
        else:
            (name, source), (its, origin) = _parts(gate, "linear"), _parts(up, "linear")
            if source is x is origin and len({name, its, down}) == 3:
                return GatedMLP(activation, name, its, down), [gate, up, y]
    return None


def _node(symbol: Any) -> tuple[str, tuple[Any, ...]]:
    if type(symbol) is not Symbol:
        return "", ()
    _, kind, parts, _ = symbol._node
    return kind, parts


def _parts(symbol: Any, kind: str) -> tuple[Any, Any]:
    """Both parts of a symbol of this kind."""
    found, parts = _node(symbol)
    return parts if found == kind else (None, None)


def _are_equal(found: Any, value: Any) -> bool:
    """Whether two objects that never change are equal: a property may make a new one each time."""
    return type(found) is type(value) and isinstance(value, PRIMITIVES) and bool(found == value)


def _distinct(reads: list[Read]) -> tuple[Read, ...]:
    return tuple({(id(mapping), key): (mapping, key, v) for mapping, key, v in reads}.values())
