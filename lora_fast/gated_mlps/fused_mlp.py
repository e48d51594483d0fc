"""A gated MLP that runs as one operation.

The class of the module becomes a subclass of it, so that copies, replicas and pickles run fused as
well, and a forward that somebody sets on the module later is theirs. Nothing of a layer is kept
between calls. The proof of what the forward computes is kept with everything that it relies on, and
made again where any of that has changed.
"""

from __future__ import annotations

import copyreg
import functools
import math
import types
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.choice import is_one_row_on_a_cpu
from ..base_layer.call_counts import CallCounts
from ..base_layer.obstacles import environment_obstacle, is_eager
from ..factors import Factors
from ..gated import GatedLinears
from ..operation.gated_mlp import compute, run
from .discovery import STATE, GatedMLP, Proof, prove
from .operands import (
    Operand,
    is_adapted,
    linears_of,
    may_be_adapted,
    no_linear,
    obstacle,
    read,
)

# Attribute of the class of a fused MLP: the class that it was.
STOCK = "_lora_fast_stock"


class MLPState:
    """What a fused MLP holds: counts, Liger's forward in place of its own, and a proof."""

    def __init__(self, calls: CallCounts, liger: Any = None) -> None:
        self.calls, self.liger = calls, liger
        self.proof: Proof | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return MLPState, (self.calls, self.liger)

    def proven(self, module: nn.Module) -> Proof:
        """What the forward of `module` computes now."""
        proof = self.proof
        if proof is None or not proof.holds(module):
            proof = self.proof = prove(module, linears_of(module))
        return proof


class FusedMLP:
    """Mixin before the class of a gated MLP: one operation, or the forward of that class.

    One row on a CPU goes through the layers: it saves next to nothing, and one operation of all
    takes longer on the host than three."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        state: MLPState | None = module.__dict__.get(STATE)
        if state is not None:
            if torch.compiler.is_compiling():
                y: Tensor | str = "layers are operators"
            elif len(args) == 1 and not kwargs:
                if state.liger is None and is_one_row_on_a_cpu(args[0]):
                    return super().forward(*args)  # type: ignore[misc]
                y = output(module, state, args[0])
            else:
                y = "extra arguments"
            if not isinstance(y, str):
                state.calls.fused += 1
                return y
            state.calls.add_fallback(y)
            if state.liger is not None:
                return state.liger(self, *args, **kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    forward.passes_on = True  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        make, arguments, state, *others = reduced
        module: Any = self
        if make is not copyreg.__newobj__ or arguments[0] is not type(self):  # type: ignore[attr-defined]
            return reduced
        stock = getattr(type(self), STOCK)
        if any(map(may_be_adapted, linears_of(module).values())) or not isinstance(state, dict):
            return _new, (stock, *arguments[1:]), state, *others
        # Merged and unloaded: nothing of PEFT is left in the module, and nothing of ours need be.
        state = {name: value for name, value in state.items() if name != STATE}
        return object.__new__, (stock,), state, *others


@functools.cache
def fused_class(stock: Any) -> Any:
    """The fused class of the modules of a class, with its name."""
    names = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        STOCK: stock,
    }
    return types.new_class(stock.__name__, (FusedMLP, stock), exec_body=lambda ns: ns.update(names))


def _new(stock: type, *arguments: Any) -> Any:
    cls: Any = fused_class(stock)
    return cls.__new__(cls, *arguments)


def output(module: nn.Module, state: MLPState, x: Any) -> Tensor | str:
    """The output of a fused MLP for x, or the reason why its own forward must run."""
    if not is_eager():
        return environment_obstacle() or ""
    proof = state.proven(module)
    mlp = proof.mlp
    if mlp is None:
        return proof.reason or ""
    found = observed(module, proof)
    if found is not None:
        return found
    if not isinstance(x, Tensor):
        return f"x is {type(x).__name__}"
    kind = x.device.type
    casts = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    children: Any = module._modules
    gate, down = children[mlp.gate], children[mlp.down]
    up = None if mlp.up is None else children[mlp.up]
    of_gate = read(gate, x, casts)
    of_up = None if up is None else read(up, x, casts)
    y = _plain(mlp, x, (gate, up, down), of_gate, of_up, casts)
    return _computed(mlp, x, casts, (gate, up, down), of_gate, of_up) if y is None else y


def observed(module: nn.Module, proof: Proof) -> str | None:
    """Why somebody may see or change the values between the layers, or leaves adapters out."""
    children: Any = module._modules
    layers = [children.get(name) for name in proof.names]
    found = obstacle([*layers, *proof.modules])
    if found is None:
        return None
    layer, reason = found
    for name, child in zip(proof.names, layers, strict=True):
        if child is layer:
            return f"{name}: {reason}"
    return f"{reason} on {type(layer).__name__}"


def _computed(
    mlp: GatedMLP,
    x: Tensor,
    casts: torch.dtype | None,
    layers: tuple[Any, Any, Any],
    of_gate: Operand | str,
    of_up: Operand | str | None,
) -> Tensor | str:
    """The output, with those layers computed by themselves that the operation does not cover."""
    gate, up, down = layers
    first = [each for each in (of_gate, of_up) if isinstance(each, Operand)]
    dtypes = {each.returns for each in first} or {casts or x.dtype}
    (dtype, *different) = dtypes
    of_down = _read_by(down, x, dtype, casts)
    covered = [*first, of_down] if isinstance(of_down, Operand) else first
    if not any(map(is_adapted, layers)):
        return "no adapted layer"
    if isinstance(of_gate, str) and dtype is torch.float64:
        return of_gate
    computes = {each.computes for each in covered} or {dtype}
    widens = bool(first) and dtype is not first[0].computes
    apart = len(first) < (1 if mlp.up is None else 2) or not isinstance(of_down, Operand)
    if len(computes) > 1 or different or (widens and (apart or dtype is not torch.float32)):
        return "dtypes of the layers differ"
    (computed,) = computes
    g = of_gate.factors if isinstance(of_gate, Operand) else gate(x)
    u = None if up is None else of_up.factors if isinstance(of_up, Operand) else up(x)
    outside = [t.dtype for t in (g, u) if isinstance(t, Tensor)]
    if any(each is not computed for each in outside):
        of_down = "h has another dtype"
    _count(*(layer for layer, f in ((gate, g), (up, u)) if isinstance(f, Factors)))
    if isinstance(of_down, str):
        return down(compute(_in(x, computed), g, u, None, mlp.activation))
    y = compute(_in(x, computed), g, u, of_down.factors, mlp.activation)
    _count(down)
    return y if y.dtype is of_down.returns else y.to(of_down.returns)


def _plain(
    mlp: GatedMLP,
    x: Tensor,
    layers: tuple[Any, Any, Any],
    of_gate: Operand | str,
    of_up: Operand | str | None,
    casts: torch.dtype | None,
) -> Tensor | None:
    """The output of an MLP of layers that are all part of the operation, in one dtype; None if
    there is more to consider."""
    gate, up, down = layers
    if type(of_gate) is not Operand or of_gate.computes is not of_gate.returns:
        return None
    factors, dtype, _ = of_gate
    if up is None:
        u = None
    elif type(of_up) is Operand and of_up[1:] == (dtype, dtype):
        u = of_up.factors
        if (
            u.constants.dropout_p != factors.constants.dropout_p
            or u.weight.shape[0] != factors.weight.shape[0]
        ):
            return None
    else:
        return None
    features = getattr(down, "in_features", None)
    if type(features) is not int:
        return None
    of_down = read(down, x.new_empty((0, features), dtype=dtype), casts)
    if type(of_down) is not Operand or of_down[1:] != (dtype, dtype):
        return None
    d = of_down.factors
    for f in (factors, d) if u is None else (factors, u, d):
        s = f.constants.scaling
        if type(s) is not float or not -math.inf < s < math.inf:
            return None
    width = factors.weight.shape[0]
    if d.weight.shape[1] * (2 if u is None else 1) != width:
        return None
    x = x if x.dtype is dtype else x.to(dtype)
    _count(gate, up)
    y = run(x, GatedLinears(factors, u, d), mlp.activation)
    _count(down)
    return y


def _read_by(down: Any, x: Tensor, dtype: torch.dtype, casts: torch.dtype | None) -> Operand | str:
    """The layer that reads h of this dtype, for an x; whatever took its place runs alone."""
    features = getattr(down, "in_features", None)
    if not isinstance(features, int):
        return no_linear(down)
    return read(down, x.new_empty((0, features), dtype=dtype), casts)


def _count(*layers: Any) -> None:
    """Count a call of those that are adapted. gate and up are counted before the operation, down
    after it: checkpointing ends a recomputation where down has saved what it needs, and the counts
    are those of layers that run by themselves."""
    for layer in layers:
        if layer is not None and "_lora_fast_calls" in layer.__dict__:
            layer._lora_fast_calls.fused += 1


def _in(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)
