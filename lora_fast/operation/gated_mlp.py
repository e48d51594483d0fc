"""A gated MLP as one operation, and its gradients.

    y = h Wdᵀ + s (drop(h) Adᵀ) Bdᵀ          h = act(gate) ⊙ up
    gate = x Wgᵀ + s (drop(x) Agᵀ) Bgᵀ       up = x Wuᵀ + s (drop(x) Auᵀ) Buᵀ

Saved for backward, beside parameters: x, gate, up and the three S; not h, which is computed again,
and no mask, which is drawn again. What a layer has beyond its A, B and bias is not part of it: such
a layer is computed by itself, and the remainder of the MLP here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.protocol import Backend
from ..backends.selection import backend_for
from ..backends.torch_gated import activated
from ..factors import Constants, Factors, Needs, needs_of_all, saved_input
from ..gated import NO_NEEDS, Activation, GatedLinears, GatedNeeds, GatedSaved
from ..nf4 import NF4Weight
from . import autograd, recomputation
from .batched_gradients import is_of_autograd, is_vmap_active
from .saved_leaves import as_they_are
from .second_derivatives import differentiable_once
from .seeds import draw_seed
from .selective import are_modes_active, is_observed, unobserved
from .validation import check_gated

Seed = int | Tensor | None
_autograd: Any = torch._C._autograd
# Tensors of one layer among the arguments of apply(): weight, bias, A, B.
_PER_LAYER = 4


def compute(
    x: Tensor,
    gate: Factors | Tensor,
    up: Factors | Tensor | None,
    down: Factors | None,
    activation: Activation,
    dropout_seeds: tuple[Seed, Seed] = (None, None),
) -> Tensor:
    """y [..., N] for x [..., H], differentiable, after all checks; h [..., I] without down.

    gate, up, down: the layers [I, H], [I, H], [N, I], with any factors of the equation. A tensor in
    the place of gate or up is its output [..., I], computed elsewhere. Without up, gate is both,
    [2I, H], the rows of gate first. `dropout_seeds`: of the masks of x and of h, which are drawn
    unless they are given.

    Raises as :func:`lora_fast.functional.gated_mlp` says.
    """
    check_gated(x, gate, up, down, activation, dropout_seeds)
    kind = "cuda" if x.is_cuda else x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    shares = _share_a_mask(gate, up)
    gate = gate if shares and _is_covered(gate) else _alone(x, gate, dropout_seeds[0])
    if up is not None:
        up = up if shares and _is_covered(up) else _alone(x, up, dropout_seeds[0])
    elif isinstance(gate, Tensor):
        gate, up = gate.chunk(2, dim=-1)
    outside = any(isinstance(t, Tensor) and t.dtype is not x.dtype for t in (gate, up))
    if outside or torch.compiler.is_compiling() or _transforms():
        return _composed(x, gate, up, down, activation, dropout_seeds)
    x = torch._C._functorch.unwrap_if_dead(x)
    if down is None or _is_covered(down):
        return run(x, GatedLinears(gate, up, down), activation, dropout_seeds)
    h = run(x, GatedLinears(gate, up, None), activation, dropout_seeds)
    return _alone(h, down, dropout_seeds[1])


def _is_covered(f: Factors | Tensor) -> bool:
    """Whether a layer is computed within the operation; a tensor is its output already."""
    if isinstance(f, Tensor):
        return True
    weight, scaling = f.weight, f.constants.scaling
    trains = isinstance(weight, Tensor) and weight.requires_grad
    beyond = f.b, f.d, f.g, f.constants.rank_spans
    return not trains and beyond == (None,) * 4 and not isinstance(scaling, Tensor)


def _share_a_mask(gate: Factors | Tensor, up: Factors | Tensor | None) -> bool:
    """Whether gate and up have one rate of dropout, if both have a low rank."""
    layers = [f for f in (gate, up) if isinstance(f, Factors) and f.A is not None]
    return len({f.constants.dropout_p for f in layers}) <= 1


def _alone(x: Tensor, f: Factors | Tensor, seed: Seed) -> Tensor:
    return f if isinstance(f, Tensor) else autograd.compute(x, [f], seed)[0]


def _transforms() -> bool:
    """Whether torch.func is at work, for which the layers are made but not this operation."""
    return bool(torch._C._are_functorch_transforms_active()) and autograd.is_recording()


def _composed(
    x: Tensor,
    gate: Factors | Tensor,
    up: Factors | Tensor | None,
    down: Factors | None,
    activation: Activation,
    dropout_seeds: tuple[Seed, Seed],
) -> Tensor:
    """The layers' own operations and torch's activation: in a graph, which fuses it, or in dtypes
    that differ."""
    if isinstance(gate, Factors) and isinstance(up, Factors) and gate.A is not None is not up.A:
        gate, up = autograd.compute(x, [gate, up], dropout_seeds[0])
    gate = _alone(x, gate, dropout_seeds[0])
    gate, up = gate.chunk(2, dim=-1) if up is None else (gate, _alone(x, up, dropout_seeds[0]))
    h = activated(gate, activation) * up
    return h if down is None else _alone(h, down, dropout_seeds[1])


def run(
    x: Tensor,
    linears: GatedLinears,
    activation: Activation,
    dropout_seeds: tuple[Seed, Seed] = (None, None),
) -> Tensor:
    """:func:`compute` for operands that are known to fit together, of layers that are part of the
    operation, x in the compute dtype, outside of torch.func and torch.compile."""
    if are_modes_active() and is_observed():
        with unobserved():
            return run(x, linears, activation, dropout_seeds)
    linears, backend = _with_seeds(x, linears, dropout_seeds), backend_for(x.device)
    read = x if linears.read_x else None
    if not autograd.is_recording():
        return backend.gated_forward(read, linears, activation, NO_NEEDS)[0]
    tensors: list[Any] = [f if isinstance(f, Tensor) else None for f in linears[:2]]
    for f in linears:
        tensors += _tensors_of(f)
    if _train([read, *tensors[:-_PER_LAYER]]):
        return GatedMLP.apply(read, linears, activation, backend, *tensors)
    # Only down may train: h is all that it needs.
    h = backend.gated_forward(read, linears._replace(down=None), activation, NO_NEEDS)[0]
    down = linears.down
    return h if down is None else autograd.run(h, [down], down.constants.dropout_seed)[0]


def _tensors_of(f: Any) -> tuple[Any, ...]:
    if not isinstance(f, Factors):
        return (None,) * _PER_LAYER
    return (f.weight if isinstance(f.weight, Tensor) else None, f.bias, f.A, f.B)


def _train(tensors: Sequence[Any]) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _with_seeds(x: Tensor, linears: GatedLinears, seeds: tuple[Seed, Seed]) -> GatedLinears:
    """The layers with the seeds of their masks, and without dropout if they have no A."""
    drops = [_drops(f) for f in linears]
    of_x = draw_seed(x.device) if seeds[0] is None and (drops[0] or drops[1]) else seeds[0]
    of_h = draw_seed(x.device) if seeds[1] is None and drops[2] else seeds[1]
    found: list[Any] = list(linears)
    for i, (f, seed) in enumerate(zip(linears, (of_x, of_x, of_h), strict=True)):
        if isinstance(f, Factors):
            drawn = {"dropout_seed": seed} if drops[i] else {"dropout_p": 0.0}
            found[i] = f._replace(constants=f.constants._replace(**drawn))
    return GatedLinears(*found)


def _drops(f: Any) -> bool:
    return isinstance(f, Factors) and f.A is not None and f.constants.dropout_p > 0.0


class GatedMLP(torch.autograd.Function):
    """apply(x, linears, activation, backend, gate, up, weight_1, bias_1, A_1, B_1, weight_2, …) →
    y: gate and up are outputs that were computed elsewhere, the other tensors those of linears."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        linears: GatedLinears,
        activation: Activation,
        backend: Backend,
        *tensors: Tensor | None,
    ) -> Tensor:
        reads_x = tuple(isinstance(f, Factors) for f in linears[:2])
        needs, unread = _needs_of(ctx.needs_input_grad, reads_x)
        ctx.needs = needs
        ctx.decoded = _decoded_again(linears, needs)
        read_by: list[Any] = list(linears)
        for i in ctx.decoded:
            (read_by[i],) = recomputation.remembering([read_by[i]])
        y, saved = backend.gated_forward(x, GatedLinears(*read_by), activation, needs)
        weights = recomputation.saved_weights([read_by[i] for i in ctx.decoded], y)
        read = None if x is None else _saved_input(x, linears, needs, backend)
        drawn: list[Tensor | None] = [None, None, None]
        for i, f in enumerate(linears):
            if isinstance(f, Factors) and isinstance(f.constants.dropout_seed, Tensor):
                drawn[i] = f.constants.dropout_seed
        of_layers = as_they_are(tensors[2:], unread)
        if read is not None and read.is_leaf and read.dim() != 2:
            read = read.detach()  # as x_as_it_is does
        ctx.save_for_backward(read, *saved, *drawn, *of_layers, *weights)
        ctx.others = [_unsaved(f) for f in linears]
        ctx.backend, ctx.activation, ctx.is_fused = backend, activation, linears.is_fused
        # What hooks hand in again, and whether they keep it, nobody knows.
        ctx.is_hooked = _autograd._top_saved_tensors_default_hooks(True) is not None
        ctx.is_overwritten = False
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or is_vmap_active() or is_of_autograd(dY):
            # As in autograd.py.
            return _differentiable_once(ctx, dY)
        return _gradients(ctx, dY)


def _gradients(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
    # Which raises if an earlier backward pass ended well.
    x, gate, up, S, Sd, *tensors = ctx.saved_tensors
    if ctx.is_overwritten:
        raise RuntimeError(
            "the forward pass must run again: a backward pass that failed had overwritten what was "
            "saved for it"
        )
    drawn, tensors = tensors[:3], tensors[3:]
    found: list[Any] = [gate, up, None]
    for i, (other, seed) in enumerate(zip(ctx.others, drawn, strict=True)):
        if other is None:
            continue
        packed, constants = other
        if seed is not None:
            constants = constants._replace(dropout_seed=seed)
        W, bias, A, B = tensors[_PER_LAYER * i : _PER_LAYER * (i + 1)]
        found[i] = Factors(packed if W is None else W, bias, A, B, constants=constants)
    weights = tensors[_PER_LAYER * len(found) :]
    for i, W in zip(ctx.decoded, weights, strict=True):
        (found[i],) = recomputation.with_saved([found[i]], [W])
    if ctx.is_fused:
        found[1] = None
    ctx.is_overwritten = in_place = _is_last_reader(ctx)
    grads = ctx.backend.gated_backward(
        dY, x, GatedSaved(gate, up, S, Sd), GatedLinears(*found), ctx.activation, ctx.needs,
        in_place=in_place,
    )  # fmt: skip
    of_layers = [(None, of.bias, of.A, of.B) for of in grads[1:]]
    return (grads.x, None, None, None, grads.gate.x, grads.up.x, *itertools.chain(*of_layers))


_differentiable_once = differentiable_once(_gradients)


def _is_last_reader(ctx: Any) -> bool:
    """Whether nobody reads the saved tensors of a node after this backward pass: autograd releases
    them, and it alone has them."""
    return not (
        ctx.is_hooked or torch.is_grad_enabled() or _autograd._get_current_graph_task_keep_graph()
    )


@functools.lru_cache(maxsize=256)
def _needs_of(
    needs_input_grad: tuple[bool, ...], reads_x: tuple[bool, ...]
) -> tuple[GatedNeeds, tuple[int, ...]]:
    """The gradients of every layer, by the arguments of apply() that need one, and which of the
    layers' tensors no gradient reads: frozen biases."""
    needs_x, _, _, _, *rest = needs_input_grad
    found, of_h = [], False
    for i in range(3):
        _, bias, A, B = rest[2 + _PER_LAYER * i :][:_PER_LAYER]
        of_input = of_h if i == 2 else needs_x if reads_x[i] else rest[i]
        found.append(Needs(x=of_input, bias=bias, A=A, B=B))
        of_h = of_h or any(found[-1])
    return GatedNeeds(*found), tuple(_PER_LAYER * i + 1 for i in range(3) if not found[i].bias)


def _decoded_again(linears: GatedLinears, needs: GatedNeeds) -> list[int]:
    """The layers whose NF4 weight is decoded by a recomputed forward pass for its backward pass."""
    if not recomputation.is_checkpointed_or_recomputed():
        return []
    return [
        i
        for i, (f, need) in enumerate(zip(linears, needs, strict=True))
        if isinstance(f, Factors) and isinstance(f.weight, NF4Weight) and need.x
    ]


def _saved_input(
    x: Tensor, linears: GatedLinears, needs: GatedNeeds, backend: Backend
) -> Tensor | None:
    """x as the gradients of A read it, None if none of them is required."""
    adapted = next((f for f in linears.read_x if f.A is not None), None)
    if adapted is None:
        return None
    need = needs_of_all(needs[:2])
    return saved_input(x, adapted.constants, need, copies=backend.copies_input)


def _unsaved(f: Any) -> tuple[NF4Weight | None, Constants] | None:
    """What backward needs of a layer beside the tensors that autograd saves."""
    if not isinstance(f, Factors):
        return None
    constants = f.constants
    if isinstance(constants.dropout_seed, Tensor):
        constants = constants._replace(dropout_seed=0)
    return None if isinstance(f.weight, Tensor) else f.weight, constants
