"""The geometry of a call's operands: a key for what depends on nothing else.

Equal geometries mean that x and the factors of every layer agree in dtype, shape, strides, device
and whether their memory starts at a multiple of 16 bytes, and in scaling and the rate of dropout.
It says nothing about what is in that memory, nor whose it is.

Nearly all calls are of plain layers (A, B and perhaps a bias, without spans; a seed is a number).
Their geometries are numbered (:class:`Numbers`), and found again by what torch.compile's guards
check a row of tensors with, at once and in C++: the geometry itself takes ten times as long.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .experts.nf4_experts import NF4Experts
from .factors import Factors
from .nf4 import NF4Weight

Geometry = Hashable
# The number of a geometry, and its tensors in a call.
Numbered = tuple[int, list[Tensor]]
_Check = Callable[..., bool]

# Geometries that are known; a run with more of them begins anew.
_MOST = 4096
_next = itertools.count(1)


class Numbers:
    """Numbers of the geometries of tensors and plain layers: equal for equal ones alone.

    `beside` is what must be equal, too: that says, not the tensors, which of them are absent.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}
        self._last: dict[Hashable, tuple[_Check, int]] = {}

    def find(
        self,
        beside: Hashable,
        tensors: Sequence[Tensor],
        fs: Sequence[Factors],
        number: int | None = None,
    ) -> tuple[int | None, list[Tensor]]:
        """The number of a geometry, None for a new one, and all its tensors; faster with a `number`
        that was found for these layers in the same call."""
        found, at = [*tensors], 0
        for t in tensors:
            at |= t.data_ptr()
        W: Any = fs[0][3]
        # What differs from layer to layer of a model; what else does, the check finds.
        key: list[Any] = [beside, number]
        if number is None:
            key += (tensors[0].shape, W.shape)
        for W, bias, A, B, _, _, _, constants in fs:
            assert A is not None and B is not None
            # Of a parameter, isinstance() asks the class of Tensor.
            if type(W) is not NF4Weight:
                found += (W, A, B)
                at |= W.data_ptr() | A.data_ptr() | B.data_ptr()
            else:
                parts = parts_of(W)
                found += (*parts, A, B)
                at |= A.data_ptr() | B.data_ptr()
                for t in parts:
                    at |= t.data_ptr()
                if number is None:
                    state = W.quant_state
                    second = state.state2.blocksize if state.nested else None
                    key += (tuple(state.shape), state.blocksize, second)
            if bias is not None:
                found.append(bias)
                at |= bias.data_ptr()
            if number is None:
                key += (constants[0], constants[1])
        key.append(len(found))
        asked = tuple(key)
        last = self._last.get(asked)
        if last is not None and not at & 15 and last[0](*found):
            return last[1], found
        known = self._known.get((beside, of_any(tensors, fs)))
        if known is not None and not at & 15:
            self._note(asked, found, known)
        return known, found

    def add(
        self,
        beside: Hashable,
        tensors: Sequence[Tensor],
        fs: Sequence[Factors],
        number: int | None = None,
    ) -> int:
        """A number for a new geometry, which find() did not find."""
        if len(self._known) >= _MOST:
            # No number is given twice, so those that are lost mean nothing.
            self._known.clear()
        added = self._known.setdefault((beside, of_any(tensors, fs)), next(_next))
        self.find(beside, tensors, fs, number)  # which notes it
        return added

    def _note(self, key: Hashable, tensors: Sequence[Tensor], number: int) -> None:
        check = check_of(tensors)
        if check is not None:
            if len(self._last) >= _MOST:
                self._last.clear()
            self._last[key] = check, number


def check_of(tensors: Sequence[Tensor]) -> _Check | None:
    """Whether other tensors, each another one, agree with these in type, dtype, device, shape,
    strides, in whether they require a gradient, and in what PyTorch dispatches by; None if this
    version of PyTorch has no such check."""
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    try:
        kind: Any = torch._C._dynamo.guards.TensorGuards
        guards = kind(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        check: _Check = guards.check
    except (AttributeError, TypeError):
        return None
    return check


def parts_of(weight: NF4Weight | NF4Experts) -> tuple[Tensor, ...]:
    """The tensors that an NF4 weight consists of."""
    state = weight.quant_state
    if not state.nested:
        return weight.packed, state.absmax, state.code
    second = state.state2
    return weight.packed, state.absmax, state.code, second.absmax, second.code, state.offset


def of_any(tensors: Sequence[Tensor | None], fs: Sequence[Factors]) -> Geometry:
    """Of any call: of what differs from call to call, and of the factors of its layers."""
    found: list[Any] = [len(tensors)]
    for f in fs:
        weight: Any = f.weight
        found += f.constants[:2]
        if isinstance(weight, NF4Weight):
            state = weight.quant_state
            second = state.state2.blocksize if state.nested else None
            found += (tuple(state.shape), state.blocksize, second)
    for t in [*tensors, *tensors_of(fs)]:
        found += (
            (None,) if t is None else (t.dtype, t.shape, t.stride(), t.device, t.data_ptr() & 15)
        )
    return tuple(found)


def tensors_of(fs: Sequence[Factors]) -> list[Tensor | None]:
    """The tensors of every layer, None for absent ones: the weight or what an NF4 weight consists
    of, then the other factors, the spans and dropout's seed in memory."""
    found: list[Tensor | None] = []
    for f in fs:
        weight: Any = f.weight
        if isinstance(weight, NF4Weight):
            found += parts_of(weight)
        else:
            found.append(weight)
        _, _, seed, spans = f.constants
        found += (*f[1:-1], spans, seed if isinstance(seed, Tensor) else None)
    return found
