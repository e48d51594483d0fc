"""Sibling LoRA layers in a graph of torch.compile: one operator for q, k and v, or gate and up.

As in eager mode (:mod:`shared_input`) the layer that is called first computes the outputs of all,
and the others take theirs. Here both happen while Dynamo traces: the outputs are values of the
graph, held by the group until the last sibling has taken its own, so that nothing is left when the
trace ends. What decides is read by the code that Dynamo traces, which guards it: adapters, hooks,
modes, what is merged. Only who calls is asked of Dynamo itself, for the code that is traced cannot
change without a new trace, nor can the conditions in it, which it evaluates itself.

An output is taken only within the same call of the parent's forward, for the same x and the same
state of its layer, unmodified since. A layer that is compiled by itself, or after a graph break,
computes alone.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.comptime import comptime

from ..base_layer.linear import adapted_together
from .lora_state import State, is_plain, member_of

# Attributes of a layer: its group and its index there; why it was compiled alone.
GROUP, ALONE = "_lora_fast_group", "_lora_fast_compiled_alone"
_calls = itertools.count(1)


class _Noted(threading.local):
    """What was asked of Dynamo: set while it traces, read in the next instruction."""

    call, holds, versions = 0, False, ""


_noted = _Noted()


class Held(NamedTuple):
    """Outputs of siblings, each with the state and the versions it was computed from, by index; for
    x."""

    x: Tensor
    outputs: dict[int, tuple[Tensor, State, str]]


def _note_call(context: Any) -> None:
    """Note the call of the parent's forward in which `layer` is called, 0 and why if it is not, and
    whether its group holds outputs of that call."""
    frame = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    layer = context.get_local("layer")
    layer = _value_of(layer._i_will_not_complain_if_bc_breaks_VariableTracker())
    group, index = layer.__dict__[GROUP]
    _noted.call, _noted.holds = 0, False
    layer.__dict__[ALONE] = "torch.compile: called by another forward"
    while frame is not None and frame.f_globals.get("__name__") in group.modules_between:
        frame = frame.parent
    if frame is None or not frame.f_code.co_argcount:
        return
    parent = _value_of(frame.symbolic_locals.get(frame.f_code.co_varnames[0]))
    if not isinstance(parent, nn.Module):
        return
    if not group.is_called_by(frame.f_code, parent, index, layer):
        return
    if group.parent() is not parent:
        layer.__dict__[ALONE] = "torch.compile: a copy that was never called before"
        return
    _noted.call = frame.__dict__.setdefault("_lora_fast_call", next(_calls))
    # Not asked of the group, whose state outside of this trace would become a guard.
    _noted.holds = group.held_in == _noted.call
    del layer.__dict__[ALONE]


def _note_hold(context: Any) -> None:
    group = context.get_local("group")._i_will_not_complain_if_bc_breaks_VariableTracker()
    _value_of(group).held_in = _noted.call


def _value_of(variable: Any) -> Any:
    """The object that a variable of Dynamo stands for."""
    variable = variable.realize() if hasattr(variable, "realize") else variable
    return getattr(variable, "value", None)


def _note_versions(context: Any) -> None:
    """Note how often each of `tensors` has been changed in place so far."""
    proxies = context.get_local("tensors").as_proxy()
    _noted.versions = str([p.node.meta["example_value"]._version for p in proxies])


@torch._dynamo.assume_constant_result
def _noted_call() -> int:
    return _noted.call


@torch._dynamo.assume_constant_result
def _noted_holds() -> bool:
    return _noted.holds


@torch._dynamo.assume_constant_result
def _noted_versions() -> str:
    return _noted.versions


def _call_of(layer: Any) -> tuple[int, bool]:
    comptime(_note_call)
    return _noted_call(), _noted_holds()


def _versions_of(tensors: list[Tensor]) -> str:
    comptime(_note_versions)
    return _noted_versions()


def _tensors_of(x: Tensor, state: State) -> list[Tensor]:
    tensors = [x, state.base.weight]
    for adapter in state.adapters:
        tensors += [adapter.A, adapter.B]
    return tensors


def _is_unchanged(state: State, before: State) -> bool:
    if state.base is not before.base or len(state.adapters) != len(before.adapters):
        return False
    for adapter, old in zip(state.adapters, before.adapters, strict=True):
        if adapter.A is not old.A or adapter.B is not old.B or adapter.bias is not old.bias:
            return False
        if adapter.scaling != old.scaling or adapter.dropout_p != old.dropout_p:
            return False
    return True


def _hold(group: Any, held: Held | None) -> None:
    # Dynamo refuses side effects inside a checkpointed region, since they would not be repeated in
    # backward. This one is undone before the region ends.
    torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer(
        setattr, group, "held", held
    )


def held_output(layer: Any, x: Tensor) -> Tensor | None:
    """The output that a sibling has computed for `layer` and x in this call of their parent."""
    group, index = layer._lora_fast_group
    call, holds = _call_of(layer)
    if not call:
        _hold(group, None)  # what a graph break left
    if not holds:
        return None
    held: Held = group.held
    if held.x is not x or index not in held.outputs:
        return None
    y, before, versions = held.outputs[index]
    others = {i: output for i, output in held.outputs.items() if i != index}
    _hold(group, Held(x, others) if others else None)
    state, found = layer.active()
    if found is not None or not is_plain(state) or not _is_unchanged(state, before):
        return None
    return y if versions == _versions_of(_tensors_of(x, state)) else None


def output_with_siblings(layer: Any, state: State, x: Tensor, followers: Any) -> Tensor | None:
    """The output of a layer, which also computes and holds those of its siblings; None if the layer
    computes alone. followers(group, index, parent, x, state): those that can be computed with it,
    each with its index and state."""
    group, index = layer._lora_fast_group
    if index + 1 == len(group.names) or not is_plain(state):
        return None
    call, holds = _call_of(layer)
    if not call or (holds and group.held.x is x):
        return None  # the first sibling could not have computed this one
    siblings = followers(group, index, group.parent(), x, state)
    if not siblings:
        return None
    states = [state, *[found for _, _, found in siblings]]
    bases, members = [found.base for found in states], [member_of(found) for found in states]
    ys = adapted_together(bases, x, members, state.adapters[0].dropout_p)
    if ys is None:
        return None
    outputs = {}
    for (i, sibling, its), y in zip(siblings, ys[1:], strict=True):
        outputs[i] = (sibling.result(y), its, _versions_of(_tensors_of(x, its)))
    _hold(group, Held(x, outputs))
    comptime(_note_hold)
    return ys[0]
