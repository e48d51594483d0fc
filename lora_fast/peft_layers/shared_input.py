"""Sibling LoRA layers that are called with the same x: q, k and v, or gate and up.

No model code is patched. The first sibling that is called with a tensor computes the outputs of all
in one function, and keeps those of the others for the calls with that very tensor object. Whatever
is not as expected then (another tensor, x or a parameter changed since, another mode of autograd,
hooks before a sibling, a sibling that is not plain LoRA) is computed anew, by the layer alone. A
group whose kept outputs are not fetched (cross-attention: k and v read something else) is given up.
Siblings share drop(x) as they share x; PEFT draws a mask for each.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

GROUP = "_lora_fast_group"
# Children of one module that read the same x, by the names that model families give them.
_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
# Times in a row that kept outputs may go unfetched.
_PATIENCE = 2


class Kept(NamedTuple):
    """An output that was computed for a sibling, and what it was computed from."""

    y: Tensor
    signature: Any


class Group:
    """Layers that may share their input. Copies of a model get a group that its layers join anew.

    Holds no layer alive, and x only as long as the outputs that are kept need it.
    """

    def __init__(self, size: int) -> None:
        self._members: list[weakref.ref[Any] | None] = [None] * size
        self._x: weakref.ref[Tensor] | None = None
        self._circumstances: Any = None
        self._kept: dict[int, Kept] = {}
        self._unfetched = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Group, (len(self._members),)

    def join(self, index: int, layer: Any) -> bool:
        """Make `layer` the member `index`; False while another living layer is."""
        reference = self._members[index]
        member = None if reference is None else reference()
        if member is None:
            self._members[index] = weakref.ref(layer)
        return member is None or member is layer

    def fetch(self, index: int, x: Tensor, signature: Any) -> Tensor | None:
        """The output that was kept for member `index`, if it is still that of x."""
        kept = self._kept.get(index)
        if kept is None or self._x is None or self._x() is not x:
            return None
        if self._circumstances != _circumstances(x) or kept.signature != signature:
            return None
        return self._kept.pop(index).y

    def keep(self, x: Tensor, outputs: dict[int, Kept]) -> None:
        """Keep `outputs`, computed from x, and let go what nobody fetched."""
        self._unfetched = self._unfetched + 1 if self._kept else 0
        self._kept = outputs
        self._circumstances = _circumstances(x)
        self._x = weakref.ref(x, self._forget)

    @property
    def given_up(self) -> bool:
        return self._unfetched >= _PATIENCE

    def others(self, index: int) -> list[tuple[int, Any]] | None:
        """(index, layer) of the other members, None unless all of them are there."""
        found = []
        for i, reference in enumerate(self._members):
            layer = None if reference is None else reference()
            if layer is None:
                return None
            if i != index:
                found.append((i, layer))
        return found

    def _forget(self, reference: Any) -> None:
        if reference is not self._x:
            return
        # Letting go of the outputs may free x itself, which calls this method again.
        self._x, left, self._kept = None, self._kept, {}
        self._unfetched += bool(left)


def signature_of(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Which tensors these are, whether they train, and how often they were written to."""
    found: list[Any] = []
    for t in tensors:
        if t is None:
            found.append(None)
        else:
            version = 0 if t.is_inference() else t._version
            found += (id(t), t.data_ptr(), t.requires_grad, version)
    return tuple(found)


def _circumstances(x: Tensor) -> tuple[Any, ...]:
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    return (
        *signature_of(x),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_autocast_dtype(kind) if autocast else None,
        torch.cuda.current_stream(x.device).cuda_stream if kind == "cuda" else 0,
    )


def groups_of(model: nn.Module, kind: type) -> Iterator[list[Any]]:
    """Sibling layers of type `kind` in `model` that have names of a group and the same K."""
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in _SIBLINGS:
            layers: list[Any] = [
                children[name] for name in names if isinstance(children.get(name), kind)
            ]
            widths = {layer.in_features for layer in layers}
            if len(layers) > 1 and len(set(map(id, layers))) == len(layers) and len(widths) == 1:
                yield layers


def assign(model: nn.Module, kind: type) -> None:
    """Give every group of siblings in `model` a new :class:`Group`."""
    for layers in groups_of(model, kind):
        group = Group(len(layers))
        for index, layer in enumerate(layers):
            group.join(index, layer)
            layer.__dict__[GROUP] = (group, index)


def dissolve(model: nn.Module) -> None:
    """Let all layers of `model` compute alone."""
    for module in model.modules():
        module.__dict__.pop(GROUP, None)
