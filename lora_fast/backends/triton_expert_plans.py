"""Experts on the Triton backend, repeating launches that were made before: the functions of
:mod:`triton_experts`, by the plans of :mod:`triton_plans`.

Which rows an expert has is nothing that a plan knows: the offsets are in memory, as x is. A gate
that is code of its module, which may call anything, runs between plans.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..experts.nf4_experts import NF4Experts
from ..experts.operands import Projection, Routing
from ..four_bit.decoded import Decoded, bytes_saved
from ..geometry import of_any, parts_of
from ..kernels import launch_plans
from . import triton_experts, triton_own_gates
from .torch_experts import BlockNeeds, BlockSaved, ProjectionGradients, ProjectionNeeds
from .torch_gates import Gate, GluGate
from .torch_low_rank import given
from .triton_plans import NO_SEED, PLAIN_TENSORS, repeated


def block_forward(
    x: Tensor,
    w: Tensor,
    routing: Routing,
    first: Projection,
    second: Projection,
    gate: Gate,
    needs: BlockNeeds | None,
) -> tuple[Tensor, BlockSaved | None]:
    """:func:`lora_fast.backends.torch_experts.block_forward`."""
    if not isinstance(gate, GluGate):
        return triton_own_gates.block_forward(
            x, w, routing, first, second, gate, needs, run=_repeated
        )
    compute = functools.partial(
        triton_experts.block_forward, x, w, routing, first, second, gate, needs
    )
    tensors = (x, w, routing.order, routing.offsets)
    return _repeated(("block", gate.form, needs), tensors, (first, second), compute)


def block_backward(
    dout: Tensor,
    x: Tensor | None,
    w: Tensor,
    routing: Routing,
    saved: BlockSaved,
    first: Projection,
    second: Projection,
    gate: Gate,
    needs: BlockNeeds,
) -> tuple[Tensor | None, Tensor | None, ProjectionGradients, ProjectionGradients]:
    """:func:`lora_fast.backends.torch_experts.block_backward`."""
    if not isinstance(gate, GluGate):
        return triton_own_gates.block_backward(
            dout, x, w, routing, saved, first, second, gate, needs, run=_repeated
        )
    compute = functools.partial(
        triton_experts.block_backward, dout, x, w, routing, saved, first, second, gate, needs
    )
    tensors = (dout, x, w, routing.order, routing.offsets, *saved)
    return _repeated(("block backward", gate.form, needs), tensors, (first, second), compute)


def project_forward(
    x: Tensor, offsets: Tensor, projection: Projection, needs: ProjectionNeeds
) -> tuple[Tensor, Tensor | None]:
    """:func:`lora_fast.backends.torch_experts.project_forward`."""
    compute = functools.partial(triton_experts.project_forward, x, offsets, projection, needs)
    return _repeated(("project", needs), (x, offsets), (projection,), compute)


def project_backward(
    dY: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    offsets: Tensor,
    projection: Projection,
    needs: ProjectionNeeds,
    *,
    needs_x: bool,
) -> tuple[Tensor | None, ProjectionGradients]:
    """:func:`lora_fast.backends.torch_experts.project_backward`."""
    compute = functools.partial(
        triton_experts.project_backward, dY, x, S, offsets, projection, needs, needs_x=needs_x
    )
    key = ("project backward", needs, needs_x)
    return _repeated(key, (dY, x, S, offsets), (projection,), compute)


def _repeated(
    key: Any,
    tensors: Sequence[Tensor | None],
    projections: Sequence[Projection],
    compute: Callable[[], Any],
    remembering: tuple[bool, ...] | None = None,
) -> Any:
    """compute(), or what a plan of it gives. `remembering`: of each projection whether W is part of
    what compute() returns; None if that is not known yet."""
    if remembering is None:
        for p in projections:
            if type(p[0]) is NF4Experts and p[0].decoded is not None:
                remembering = _remembering(projections, tensors)
                break
        if remembering:
            return _with_weights(key, tensors, projections, compute, remembering)
    operands, about = [*tensors], [key, remembering]
    for weight, bias, A, B, scaling in projections:
        about.append(scaling)
        if isinstance(weight, NF4Experts):
            state = weight.quant_state
            second = state.state2.blocksize if state.nested else None
            about += (weight.transposed, tuple(state.shape), state.blocksize, second)
            operands += parts_of(weight)
        else:
            operands.append(weight)
        operands += (bias, A, B)
    for t in operands:
        if t is not None and type(t) not in PLAIN_TENSORS:
            launch_plans.give_up()
            return compute()
    return repeated((*about, of_any(operands, ())), operands, NO_SEED, compute)


def _with_weights(
    key: Any,
    tensors: Sequence[Tensor | None],
    projections: Sequence[Projection],
    compute: Callable[[], Any],
    remembering: tuple[bool, ...],
) -> Any:
    """:func:`_repeated` of weights that are to remember their W, which a plan gives as well."""
    outputs, weights = _repeated(
        key, tensors, projections,
        lambda: (compute(), [_remembered(p) for p in projections]), remembering,
    )  # fmt: skip
    for p, W in zip(projections, weights, strict=True):
        decoded = _memory_of(p)
        if decoded is not None and W is not None:
            decoded.offer(W)
    return outputs


def _remembering(
    projections: Sequence[Projection], tensors: Sequence[Tensor | None]
) -> tuple[bool, ...]:
    """Of each projection whether W is to be remembered and may be saved; nothing if none is."""
    count, found = 0, []
    for p in projections:
        more = math.prod(p.weight.shape) * given(tensors[0]).element_size()
        remembers = _memory_of(p) is not None and bytes_saved.has_room(count + more)
        found.append(remembers)
        count += more if remembers else 0
    return tuple(found) if any(found) else ()


def _memory_of(p: Projection) -> Decoded | None:
    """Where W is to be remembered, if anywhere."""
    return p.weight.decoded if isinstance(p.weight, NF4Experts) else None


def _remembered(p: Projection) -> Tensor | None:
    decoded = _memory_of(p)
    return None if decoded is None else decoded.dense
