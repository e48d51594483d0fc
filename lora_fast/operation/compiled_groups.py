"""Plain LoRA layers that read the same x, as one registered operator, for torch.compile.

    lora_fast::adapted_linears           y_i = x W_iᵀ + s_i · (drop(x) A_iᵀ) B_iᵀ + bias_i
    lora_fast::adapted_linears_backward  the gradients of what trains

As the operators of one layer (:mod:`compiled_ops`), but tensors come in lists, which hold no None:
`weights` W_i, or what it is packed into; `factors` A_i, B_i and, where there is one, bias_i, layer
after layer. `shapes` tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.choice import BackendName, get_backend, uses_triton
from ..backends.selection import backend_for
from ..factors import Constants, Factors, Gradients, Needs, Saved, needs_of_all, saved_input
from .compiled_ops import (
    REVISION,
    FlatWeight,
    enabled_needs,
    registered,
    seed_in_graph,
    seed_of,
)

# Of a layer in `shapes`: N, K, tensors of W, whether there is a bias, the blocks of 4-bit values
# and of absmax values, and their table.
_SHAPE = 7


class Group(NamedTuple):
    """The arguments of both operators after x. needs: of x, then of every one of the factors."""

    weights: list[Tensor]
    factors: list[Tensor]
    seed: Tensor | None
    shapes: list[int]
    dtype: torch.dtype | None
    scalings: list[float]
    dropout_p: float
    needs: list[bool]
    backend: BackendName
    revision: int = REVISION

    def layers(self) -> list[Factors]:
        weights, factors, layers = iter(self.weights), iter(self.factors), []
        seed = seed_of(self.seed, self.weights[0].device)
        for scaling, (N, K, count, has_bias, *blocks) in zip(
            self.scalings, self._shapes(), strict=True
        ):
            parts: list[Any] = [next(weights) for _ in range(count)]
            packed = [N, K, *blocks] if count > 1 else []
            parts += [None] * (len(FlatWeight._fields) - 2 - count)
            weight = FlatWeight._make([*parts, packed, self.dtype]).weight()
            A, B = next(factors), next(factors)
            bias = next(factors) if has_bias else None
            constants = Constants(scaling, self.dropout_p, seed)
            layers.append(Factors(weight, bias, A, B, constants=constants))
        return layers

    def needs_of_layers(self) -> list[Needs]:
        needs_x, *rest = self.needs
        remaining, found = iter(rest), []
        for count in self.counts():
            A, B, *bias = (next(remaining) for _ in range(count))
            found.append(Needs(x=needs_x, A=A, B=B, bias=any(bias)))
        return found

    def widths(self) -> list[int]:
        """N of every layer."""
        return self.shapes[::_SHAPE]

    def counts(self) -> list[int]:
        """Tensors of every layer among the factors."""
        return [2 + has_bias for has_bias in self.shapes[3::_SHAPE]]

    def ranks(self) -> list[int]:
        """R of every layer."""
        found, start = [], 0
        for count in self.counts():
            found.append(self.factors[start].shape[0])
            start += count
        return found

    def _shapes(self) -> list[list[int]]:
        return [self.shapes[i : i + _SHAPE] for i in range(0, len(self.shapes), _SHAPE)]


_GROUP = (
    "Tensor[] weights, Tensor[] factors, Tensor? seed, SymInt[] shapes, ScalarType? dtype, "
    "float[] scalings, float dropout_p, bool[] needs, str backend, int revision"
)


def _forward(x: Tensor, *arguments: Any) -> list[Tensor]:
    """y of every layer, then S."""
    group = Group(*arguments)
    backend = backend_for(x.device, group.backend)
    ys, saved = backend.forward(x, group.layers(), group.needs_of_layers())
    return [*ys, x.new_empty(0) if saved.S is None else saved.S]


def _fake_forward(x: Tensor, *arguments: Any) -> list[Tensor]:
    group = Group(*arguments)
    need, M = needs_of_all(group.needs_of_layers()), math.prod(x.shape[:-1])
    ys = [x.new_empty(*x.shape[:-1], N) for N in group.widths()]
    S = x.new_empty(M, sum(group.ranks())) if need.saves_S else x.new_empty(0)
    return [*ys, S]


def _backward(
    dYs: list[Tensor | None], x: Tensor | None, S: Tensor, *arguments: Any
) -> list[Tensor]:
    """The gradients that `needs` names, in its order; dY is None where no loss reads y."""
    group = Group(*arguments)
    like = next(dY for dY in dYs if dY is not None)
    rows = []
    for dY, N in zip(dYs, group.widths(), strict=True):
        rows.append(like.new_zeros(*like.shape[:-1], N) if dY is None else dY)
    saved = Saved(S if S.dim() == 2 else None)
    backend = backend_for(like.device, group.backend)
    grads = backend.backward(rows, x, saved, group.layers(), group.needs_of_layers())
    return [grad.contiguous() for grad in _in_order(grads) if grad is not None]


def _in_order(grads: Sequence[Gradients]) -> list[Tensor | None]:
    found = [grads[0].x]
    for grad in grads:
        # The dA are parts of one product, and an operator's results may not share memory.
        found += [None if grad.A is None else grad.A.clone(), grad.B, grad.bias]
    return found


def _fake_backward(
    dYs: list[Tensor | None], x: Tensor | None, S: Tensor, *arguments: Any
) -> list[Tensor]:
    group = Group(*arguments)
    like = next(dY for dY in dYs if dY is not None)
    needs_x, *rest = group.needs
    grads = [like.new_empty(*like.shape[:-1], group.shapes[1])] if needs_x else []
    wanted = zip(rest, group.factors, strict=True)
    return grads + [factor.new_empty(factor.shape) for need, factor in wanted if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, *arguments = inputs
    group, S = Group(*arguments), output[-1]
    ctx.mark_non_differentiable(S)
    # Without a dY a layer gets no gradients, not zeros.
    ctx.set_materialize_grads(False)
    read = x if any(need.saves_x for need in group.needs_of_layers()) else None
    ctx.save_for_backward(read, S, group.seed, *group.weights, *group.factors)
    ctx.group = group._replace(weights=len(group.weights), factors=None, seed=None)  # type: ignore[arg-type]


def _autograd(ctx: Any, dYs: list[Tensor | None]) -> tuple[Any, ...]:
    x, S, seed, *tensors = ctx.saved_tensors
    count = ctx.group.weights
    group = ctx.group._replace(weights=tensors[:count], factors=tensors[count:], seed=seed)
    dYs = dYs[:-1]
    needs, remaining = [group.needs[0]], iter(group.needs[1:])
    for dY, count in zip(dYs, group.counts(), strict=True):
        needs += [next(remaining) and dY is not None for _ in range(count)]
    found = iter(adapted_linears_backward(dYs, x, S, *group._replace(needs=needs)))
    dX, *grads = (next(found) if need else None for need in needs)
    after = [None] * (len(Group._fields) - 2)
    return dX, [None] * len(group.weights), grads, *after


adapted_linears_backward = registered(
    "adapted_linears_backward",
    f"(Tensor?[] dYs, Tensor? x, Tensor S, {_GROUP}) -> Tensor[]",
    _backward,
    _fake_backward,
)
adapted_linears = registered(
    "adapted_linears", f"(Tensor x, {_GROUP}) -> Tensor[]", _forward, _fake_forward
)
adapted_linears.register_autograd(_autograd, setup_context=_setup_context)


def apply(x: Tensor, fs: Sequence[Factors], dropout_seed: int | Tensor | None) -> list[Tensor]:
    """y of every layer; they share one shrink, one dropout mask and one sum of dX."""
    name, constants = get_backend(), fs[0].constants
    seed = seed_in_graph(x, fs[0], dropout_seed, name)
    weights: list[Tensor] = []
    factors: list[Tensor] = []
    shapes: list[int] = []
    dtype = None
    for f in fs:
        *parts, sizes, packed = FlatWeight.of(f.weight)
        given = [t for t in parts if t is not None]
        N, K, *blocks = sizes or (*f.weight.shape, 0, 0, 0)
        shapes += [N, K, len(given), int(f.bias is not None), *blocks]
        weights += given
        factors += [t for t in (f.A, f.B, f.bias) if t is not None]
        dtype = dtype or packed
    needs = enabled_needs(x, *factors)
    drawn = constants._replace(dropout_p=0.0 if seed is None else constants.dropout_p)
    copies = not uses_triton(x.device, name)
    group = Group(
        weights, factors, seed, shapes, dtype, [f.constants.scaling for f in fs], drawn.dropout_p,
        needs, name,
    )  # fmt: skip
    saved = saved_input(x, drawn, needs_of_all(group.needs_of_layers()), copies=copies)
    return adapted_linears(x if saved is None else saved, *group)[: len(fs)]
