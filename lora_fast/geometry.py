"""The geometry of a call's operands: a value by which may be kept what depends on nothing else.

Equal geometries mean that x and the factors of every layer agree in dtype, shape, strides, device
and in whether their memory starts at a multiple of 16 bytes, and in scaling and the rate of
dropout. It says nothing of what is in that memory, nor whose it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .factors import Constants, Factors
from .nf4 import NF4Weight

Geometry = tuple[Any, ...]


def of_plain(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, constants: Constants
) -> Geometry | None:
    """Of one LoRA layer, the most frequent call, in few steps; None if memory is not aligned. A
    seed is a number."""
    at = x.data_ptr() | W.data_ptr() | A.data_ptr() | B.data_ptr()
    of_bias = None
    if bias is not None:
        at |= bias.data_ptr()
        of_bias = (bias.dtype, bias.shape, bias.stride(), bias.device)
    if at & 15:
        return None
    return (
        x.dtype, x.shape, x.stride(), x.device, W.dtype, W.shape, W.stride(), W.device,
        A.dtype, A.shape, A.stride(), A.device, B.dtype, B.shape, B.stride(), B.device,
        of_bias, constants[0], constants[1],
    )  # fmt: skip


def of_plain_gradients(
    dY: Tensor, x: Tensor, S: Tensor, W: Tensor, A: Tensor, B: Tensor, constants: Constants
) -> Geometry | None:
    """Of the gradients of one LoRA layer, as :func:`of_plain`."""
    at = dY.data_ptr() | x.data_ptr() | S.data_ptr() | W.data_ptr() | A.data_ptr() | B.data_ptr()
    if at & 15:
        return None
    return (
        dY.dtype, dY.shape, dY.stride(), dY.device, x.dtype, x.shape, x.stride(), x.device,
        S.dtype, S.shape, S.stride(), S.device, W.dtype, W.shape, W.stride(), W.device,
        A.dtype, A.shape, A.stride(), A.device, B.dtype, B.shape, B.stride(), B.device,
        constants[0], constants[1],
    )  # fmt: skip


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
            state = weight.quant_state
            found += (weight.packed, state.absmax, state.code)
            if state.nested:
                found += (state.state2.absmax, state.state2.code, state.offset)
        else:
            found.append(weight)
        _, _, seed, spans = f.constants
        found += (*f[1:-1], spans, seed if isinstance(seed, Tensor) else None)
    return found
