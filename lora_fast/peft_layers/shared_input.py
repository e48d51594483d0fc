"""Sibling LoRA layers that are called with the same x: q, k and v, or gate and up.

No model code is patched. The groups are read from the source of their parent's forward when the
model is accelerated (:mod:`forward_source`): layers that it calls with the same input, the later
ones whenever the first. The layer that is called first computes the outputs of all in one function
and keeps those of the others until they are called; the same in a forward pass and when
checkpointing recomputes it, with gradients and without.

An output is valid for this x (the same object, unmodified since), this thread, these parameters and
this autograd mode. It is released when it is fetched, or with x; if autograd records, with the
graph of the first layer's output, which holds x. A layer computes alone if anything but that
forward calls it, if hooks run between the calls, if x or a parameter has no version counter
(inference tensors), or if it is not plain LoRA. Siblings share drop(x) as they share x; PEFT draws
a mask for each.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.choice import is_one_row_on_a_cpu
from ..base_layer.linear import adapted_together, four_bit_dtype
from ..base_layer.obstacles import runs_own_forward
from ..four_bit import is_four_bit
from . import compiled_siblings
from .call_reader import Condition, Together, Unreadable
from .compiled_siblings import GROUP
from .forward_source import called_together, code_of_forward
from .lora_state import State, circumstances_of, fingerprint, is_plain, member_of

# Attributes of a layer: its group and its index there (GROUP); why it is in none.
ALONE = "_lora_fast_alone"
# What nn.Module runs between a forward and that of a child.
_CALL, _OUTER_CALL = nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__
# Modules whose frames may lie between a forward and the fused forward of a layer it calls.
_BETWEEN = frozenset(
    {
        "torch.nn.modules.module",
        "accelerate.hooks",
        __name__,
        compiled_siblings.__name__,
        f"{__package__}.lora_layers",
        f"{__package__}.fused_forward",
        f"{__package__}.plain_groups",
    }
)


class Site(NamedTuple):
    """The code that calls the layers of a group, the conditions under which it calls all of them,
    and the other children that it calls in between."""

    code: CodeType
    conditions: tuple[Condition, ...]
    between: tuple[str, ...]


class Kept:
    """Outputs that the first of several siblings computed, by index in the group."""

    def __init__(self, x: Tensor, first: int, outputs: dict[int, tuple[Tensor, Any]]) -> None:
        self.first, self.outputs = first, outputs
        self.circumstances = circumstances_of(x)
        self._is_alive: Any = None
        # Not a method, which would keep the outputs alive.
        forget = partial(_forget, outputs)
        self.x = weakref.ref(x, forget)
        self._forget: Callable[[Any], None] = forget

    def live_with(self, y: Tensor) -> Tensor:
        """y for the first layer to return, with whose graph the outputs are released."""
        if not y.requires_grad:
            return y
        y = _with_node_of_its_own(y, [*y.shape])
        node: Any = y.grad_fn
        alive = node.metadata[GROUP] = _Alive()
        self._is_alive = weakref.ref(alive, self._forget)
        return y


_with_node_of_its_own = torch.ops.aten._unsafe_view.default._op  # without a frame of Python


class _Alive:
    """Is released with the node of a graph."""


def _forget(outputs: dict[int, Any], reference: Any) -> None:
    outputs.clear()


class _OfThread(threading.local):
    kept: Kept | None = None


class Group:
    """Children of one module that its forward calls together, by name, in the order of the calls.

    Holds no layer. A copy finds its layers in the module whose forward calls it; unpickling reads
    the source of that forward again, which may differ there.
    """

    modules_between = _BETWEEN

    def __init__(
        self, names: tuple[str, ...], site: Site | None = None, parent: nn.Module | None = None
    ) -> None:
        self.names = names
        self.of_thread = _OfThread()
        self._site = site
        self._unsuited: CodeType | None = None
        # While torch.compile traces: compiled_siblings.py.
        self.held: Any = None
        self.held_in = 0
        self.parent: Callable[[], nn.Module | None] = _nothing
        if parent is not None:
            self.parent = weakref.ref(parent)

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        # The copy of a module is noted before what it holds is copied.
        return Group(self.names, self._site, memo.get(id(self.parent())))

    def __reduce__(self) -> tuple[Any, ...]:
        return Group, (self.names,)

    def parent_of(
        self, index: int, layer: Any, forward: FrameType | None = None
    ) -> nn.Module | None:
        """The module whose forward is calling `layer`, the member `index`; None if anything else
        calls it. `forward` is the frame of the layer's own forward, where it is known."""
        frame: FrameType | None = forward or sys._getframe(1)
        if forward is not None:
            call = forward.f_back
            outer = None if call is None or call.f_code is not _CALL else call.f_back
            if outer is not None and outer.f_code is _OUTER_CALL:
                frame = outer.f_back
        while frame is not None and frame.f_globals.get("__name__") in _BETWEEN:
            frame = frame.f_back
        if frame is None or not frame.f_code.co_argcount:
            return None
        code = frame.f_code
        if self._site is not None and code is not self._site.code:
            return None
        name, parent = self.names[index], self.parent()
        if parent is None or parent._modules.get(name) is not layer:
            parent = frame.f_locals.get(code.co_varnames[0])
            if not isinstance(parent, nn.Module) or parent._modules.get(name) is not layer:
                return None
            self.parent = weakref.ref(parent)
        if self._site is None:
            self._read(code, parent)
        return parent

    def is_called_by(self, code: CodeType, parent: nn.Module, index: int, layer: Any) -> bool:
        """Whether `code`, the forward of `parent`, calls `layer`, the member `index`, as read."""
        if self._site is None:
            self._read(code, parent)
        if self._site is None or code is not self._site.code:
            return False
        return parent._modules.get(self.names[index]) is layer and self.is_called_as_read(parent)

    def is_called_as_read(self, parent: nn.Module) -> bool:
        """Whether the current forward of `parent` calls all members, and runs no hooks in
        between."""
        site = self._site
        if site is None:
            return False
        for condition in site.conditions:
            if not condition.is_met(parent):
                return False
        return not any(map(runs_hooks, map(parent._modules.get, site.between)))

    def members(self, parent: nn.Module) -> dict[int, Any]:
        """The layers of the group that are children of `parent`; none unless its current forward
        calls all of them."""
        if self._site is None:
            with suppress(Unreadable):
                self._read(code_of_forward(parent), parent)
        if not self.is_called_as_read(parent):
            return {}
        children = [(i, parent._modules.get(name)) for i, name in enumerate(self.names)]
        return {i: c for i, c in children if c is not None and c.__dict__.get(GROUP) == (self, i)}

    def _read(self, code: CodeType, parent: nn.Module) -> None:
        """Check, in a copy from another process, whether `code` calls the layers together here."""
        if code is self._unsuited:
            return
        with suppress(Unreadable):
            for together in called_together(code, parent):
                if tuple(n for n in together.children if n in self.names) == self.names:
                    self._site = Site(code, together.conditions, together.between)
                    return
        self._unsuited = code


def _nothing() -> None:
    return None


def kept_output(layer: Any, x: Tensor, forward: FrameType | None = None) -> Tensor | None:
    """The output that a sibling has computed for `layer` and x, if nothing has changed since;
    `forward` as for :meth:`Group.parent_of`."""
    group, index = layer._lora_fast_group
    if torch.compiler.is_dynamo_compiling():
        return compiled_siblings.held_output(layer, x)
    kept: Kept | None = group.of_thread.kept
    if kept is None or kept.first >= index or kept.x() is not x:
        return None
    y, before = kept.outputs.pop(index, (None, None))
    if y is None or group.parent_of(index, layer, forward) is None:
        return None
    return y if kept.circumstances == circumstances_of(x) and before == fingerprint(layer) else None


def output_with_siblings(layer: Any, state: State, x: Tensor) -> Tensor | None:
    """The output of a layer, which also computes and keeps those of its siblings; None if the layer
    computes alone."""
    if layer._lora_fast_group is None:
        return None
    if torch.compiler.is_dynamo_compiling():
        return compiled_siblings.output_with_siblings(layer, state, x, _followers)
    group, index = layer._lora_fast_group
    kept: Kept | None = group.of_thread.kept
    if kept is not None and kept.first < index and kept.outputs and kept.x() is x:
        return None  # the first sibling could not have computed this one
    # One row as in the short way, which a recomputed forward pass may take.
    is_alone = index + 1 == len(group.names) or is_one_row_on_a_cpu(x)
    if is_alone or not is_plain(state) or x.is_inference():
        return None
    parent = None if runs_hooks(layer) else group.parent_of(index, layer)
    if parent is None or not group.is_called_as_read(parent):
        return None
    bases, members, before = [state.base], [member_of(state)], {}
    for i in range(index + 1, len(group.names)):
        sibling: Any = parent._modules.get(group.names[i])
        if sibling is None or sibling.__dict__.get(GROUP) != (group, i):
            continue
        if runs_hooks(sibling):
            break
        found = _state_of(sibling, x, state)
        printed = None if found is None else fingerprint(sibling)
        if found is not None and printed is not None:
            bases.append(found.base)
            members.append(member_of(found))
            before[i] = (sibling, printed)
    if not before:
        return None
    ys = adapted_together(bases, x, members, state.adapters[0].dropout_p)
    if ys is None:
        return None
    y, *others = ys
    outputs = {}
    for other, (i, (sibling, printed)) in zip(others, before.items(), strict=True):
        outputs[i] = (sibling.result(other), printed)
    group.of_thread.kept = kept = Kept(x, index, outputs)
    return kept.live_with(y)


def _followers(
    group: Group, index: int, parent: nn.Module, x: Tensor, state: State
) -> list[tuple[int, Any, State]]:
    """Index, layer and state of what can be computed with the member `index`, in their order."""
    found: list[tuple[int, Any, State]] = []
    if runs_hooks(parent._modules.get(group.names[index])):
        return found
    for i in range(index + 1, len(group.names)):
        sibling: Any = parent._modules.get(group.names[i])
        mine = getattr(sibling, GROUP, None)
        if mine is None or mine[0] is not group or mine[1] != i:
            continue
        if runs_hooks(sibling):
            break
        its = _state_of(sibling, x, state)
        if its is not None:
            found.append((i, sibling, its))
    return found


def _state_of(layer: Any, x: Tensor, first: State) -> State | None:
    """The state of a sibling as its own call with x would find it; None if it cannot be computed
    with `first`, or may give another result."""
    if "forward" in layer.__dict__ and not runs_own_forward(layer):
        return None
    state, found = layer.active()
    if found is not None or layer.input_obstacle(state, x) is not None or not is_plain(state):
        return None
    if is_four_bit(state.base):
        four_bit_dtype(state.base, x)  # settled by the first input, and part of its fingerprint
    return state if state.adapters[0].dropout_p == first.adapters[0].dropout_p else None


def outputs_together(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    """The outputs of siblings for x, as a forward that calls them would get them."""
    states = [layer.active()[0] for layer in layers]
    bases, members = [state.base for state in states], [member_of(state) for state in states]
    ys = adapted_together(bases, x, members, states[0].adapters[0].dropout_p)
    return [layer(x) for layer in layers] if ys is None else ys


def siblings_of(layer: Any, parent: nn.Module) -> tuple[tuple[str, ...], str | None]:
    """Names of the children of `parent` that would currently be computed with `layer`, one of them,
    or why none would, or was in a graph of torch.compile; None for a layer that shares its input
    with no other."""
    if layer.__dict__.get(GROUP) is None:
        return (), layer.__dict__.get(ALONE)
    group, index = layer.__dict__[GROUP]
    members = group.members(parent)
    hooked = [i for i, member in members.items() if runs_hooks(member)]
    rates = {i: _shared_rate(member) for i, member in members.items()}
    mine, names = rates.get(index), []
    for i, p in rates.items():
        parted = any(min(i, index) <= h <= max(i, index) for h in hooked)
        if i != index and p is not None and p == mine and not parted:
            names.append(group.names[i])
    if names:
        return tuple(names), layer.__dict__.get(compiled_siblings.ALONE)
    return (), "hooks, another dropout, or more than plain LoRA"


def _shared_rate(layer: Any) -> float | None:
    """The p of the dropout with which `layer` may share its input, None if it may not."""
    state, found = layer.active()
    return state.adapters[0].dropout_p if found is None and is_plain(state) else None


def runs_hooks(module: Any) -> bool:
    """Whether a call of `module` runs hooks, which may do anything to a sibling."""
    return module is not None and bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def assign(model: nn.Module, kind: type) -> None:
    """Assign groups to the layers of type `kind` in `model`, or the reason why they have none."""
    parents = list(model.modules())
    places = Counter(id(child) for parent in parents for child in parent._modules.values())
    for parent in parents:
        layers = {
            name: child
            for name, child in parent._modules.items()
            if isinstance(child, kind) and places[id(child)] == 1
        }
        if len(layers) > 1:
            _assign_children(parent, layers)


def _assign_children(parent: nn.Module, layers: dict[str, Any]) -> None:
    try:
        code = code_of_forward(parent)
        found = called_together(code, parent)
    except Unreadable as error:
        for layer in layers.values():
            layer.__dict__[ALONE] = str(error)
        return
    for together in found:
        for names in _of_one_width(together, layers):
            site = Site(code, together.conditions, together.between)
            group = Group(names, site, parent)
            for index, name in enumerate(names):
                layers[name].__dict__[GROUP] = (group, index)


def _of_one_width(together: Together, layers: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    names = [name for name in together.children if name in layers]
    widths = dict.fromkeys(layers[name].in_features for name in names)
    for width in widths:
        alike = tuple(name for name in names if layers[name].in_features == width)
        if len(alike) > 1:
            yield alike


def dissolve(model: nn.Module) -> None:
    """Make all layers of `model` compute alone."""
    for module in model.modules():
        module.__dict__.pop(GROUP, None)
        module.__dict__.pop(ALONE, None)
        module.__dict__.pop(compiled_siblings.ALONE, None)
