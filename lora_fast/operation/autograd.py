"""The operation, for one layer or several that read the same x, and its gradients.

Saved for backward, beside parameters: x if A (or W) trains, S = drop(x) Aᵀ if B, b or d trains, V =
(y − bias) / g if g trains. For dropout the seed is saved, and its mask drawn again; on the torch
backend also a copy of x, which the caller may change in place as with PEFT. A 4-bit weight stays
packed and is decoded again, except where checkpointing recomputes (:mod:`recomputation`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.protocol import Backend
from ..backends.selection import backend_for
from ..backends.torch_layer import row_on_a_cpu
from ..factors import Factors, Needs, Saved, needs_of_all, saved_input
from ..geometry import Numbered
from ..nf4 import NF4Weight
from . import compiled_groups, compiled_ops, recomputation
from .batched_gradients import is_of_autograd, is_vmap_active
from .saved_leaves import as_they_are
from .second_derivatives import differentiable_once
from .seeds import draw_seed
from .selective import are_modes_active, is_observed, unobserved
from .validation import check_dropout, check_operands, check_scaling

# Tensors of one layer among the arguments of apply(): all that may need a gradient except x; of
# plain layers (geometry.py), which have no b, d and g, the first.
_PER_LAYER, _PER_PLAIN_LAYER = len(Needs._fields) - 1, 4
_NOTHING = Needs()
_NONE = (None,) * _PER_LAYER
# A named tuple, without its own function.
_new = tuple.__new__


def compute(
    x: Tensor, fs: Sequence[Factors], dropout_seed: int | Tensor | None = None
) -> Sequence[Tensor]:
    """y [..., N] of every layer for x [..., K]: the equation, differentiable, after all checks.

    `fs` as for :class:`lora_fast.backends.protocol.Backend`, except that a scaling may be a tensor,
    and that dropout's seed is drawn unless it is given. Raises as
    :func:`lora_fast.functional.adapted_linear` says.
    """
    layers = []
    for f in fs:
        if isinstance(f.constants.scaling, Tensor):
            f = _with_number(f)
        check_operands(x, f)
        layers.append(f)
    check_dropout(layers[0].constants.dropout_p, dropout_seed, x)
    kind = "cuda" if x.is_cuda else x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    if torch.compiler.is_compiling():
        if len(layers) == 1:
            return [compiled_ops.apply(x, layers[0], dropout_seed)]
        return compiled_groups.apply(x, layers, dropout_seed)
    if torch._C._are_functorch_transforms_active() and is_recording():
        return run(x, layers, dropout_seed, apply=AdaptedLinears.apply)
    return run(torch._C._functorch.unwrap_if_dead(x), layers, dropout_seed)


def run(
    x: Tensor,
    layers: Sequence[Factors],
    dropout_seed: int | Tensor | None = None,
    numbered: Numbered | None = None,
    apply: Any = None,
) -> Sequence[Tensor]:
    """:func:`compute` for operands that are known to fit together, x in the compute dtype, and
    numbers as scalings, outside of torch.func and torch.compile.

    `numbered` is the geometry of plain layers, where it is known; `apply` the Function's, unless it
    is the fast one. This and what it calls run for each layer of each step: a call of a Python
    function here is 0.1 µs of the host's time, a new tensor, a view too, 0.7 µs.
    """
    if are_modes_active() and is_observed():
        with unobserved():
            return run(x, layers, dropout_seed, numbered, apply)
    if layers[0].constants.dropout_p > 0.0:
        layers = _with_seed(x, layers, dropout_seed)
        if isinstance(layers[0].constants.dropout_seed, Tensor):
            numbered = None
    backend = backend_for(x.device)
    if len(layers) == 1 and x.numel() == x.shape[-1] and x.is_cpu and apply is None:
        A = layers[0][2]
        if A is not None and A.dtype is torch.float32 and backend.name == "torch":
            y = row_on_a_cpu(x, layers[0])
            if y is not None:
                return [y]
    if not is_recording():
        needs = (_NOTHING,) * len(layers)
        if numbered is None or backend.name == "torch":
            return backend.forward(x, layers, needs)[0]
        planned: Any = backend
        return planned.forward(x, layers, needs, None, numbered)[0]
    count = _PER_LAYER if numbered is None else _PER_PLAIN_LAYER
    tensors: list[Any] = []
    for f in layers:
        tensors += (None, *f[1:count]) if type(f[0]) is NF4Weight else f[:count]
    return (apply or _apply)(x, layers, backend, numbered, *tensors)


class AdaptedLinears(torch.autograd.Function):
    """apply(x, fs, backend, numbered, weight_1, bias_1, A_1, B_1, b_1, d_1, g_1, weight_2, …) → y_1
    …: x [..., K] is in the compute dtype, all else in its own; the tensors are those of fs, with
    `numbered` without b, d and g."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        fs: Sequence[Factors],
        backend: Backend,
        numbered: Numbered | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        needs, unread = _needs_of(ctx.needs_input_grad, len(fs))
        constants, read_by, keeps_weights = fs[0][7], fs, False
        for f in fs:
            if type(f[0]) is NF4Weight and needs[0].x:
                keeps_weights = recomputation.is_checkpointed_or_recomputed()
                break
        if keeps_weights:
            read_by = recomputation.remembering(fs)
        if numbered is None or backend.name == "torch":
            ys, (S, V) = backend.forward(x, read_by, needs)
        else:
            planned: Any = backend
            if read_by is fs:
                ys, (S, V) = planned.forward(x, fs, needs, None, numbered)
            else:
                ys, (S, V) = planned.forward_remembering(x, read_by, needs, numbered)
        need = needs[0] if len(needs) == 1 else _any_of(needs)
        read: Tensor | None = x
        if backend.copies_input or not (need.A or need.weight):
            read = saved_input(x, constants, need, copies=backend.copies_input)
        if read is not None and read.is_leaf and read.dim() != 2:
            read = read.detach()  # as x_as_it_is does
        # A number stays with the constants.
        seed: Any = constants[2]
        seed = None if type(seed) is int or not isinstance(seed, Tensor) else seed
        weights = recomputation.saved_weights(read_by, x) if keeps_weights else ()
        ctx.save_for_backward(read, S, V, seed, *as_they_are(tensors, unread), *weights)
        others = []
        for f in fs:
            c = f[7] if seed is None else f[7]._replace(dropout_seed=0)
            others.append((f[0] if type(f[0]) is NF4Weight else None, c))
        number = None if numbered is None else numbered[0]
        ctx.call = needs, backend, others, keeps_weights, number
        if len(fs) > 1:
            ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dYs: Tensor | None) -> tuple[Tensor | None, ...]:
        otherwise = torch.is_grad_enabled() or is_vmap_active()
        for dY in dYs:
            otherwise = otherwise or (dY is not None and is_of_autograd(dY))
        if otherwise:
            # With create_graph=True: a derivative of what comes back raises. Or a batch of dYs.
            return _differentiable_once(ctx, *dYs)
        needs, backend, others, keeps_weights, number = ctx.call
        x, S, V, seed, *tensors = ctx.saved_tensors
        count = _PER_LAYER if number is None else _PER_PLAIN_LAYER
        fs, start = [], 0
        for packed, constants in others:
            of_layer = [*tensors[start : start + count], *_NONE[count:], constants]
            start += count
            if packed is not None:
                of_layer[0] = packed
            if seed is not None:
                of_layer[7] = constants._replace(dropout_seed=seed)
            fs.append(_new(Factors, of_layer))
        rows: Any = dYs if len(dYs) == 1 else _complete(dYs, fs)
        if not rows:
            return (None,) * len(ctx.needs_input_grad)
        if keeps_weights:
            fs = recomputation.with_saved(fs, tensors[start:])
        saved = _new(Saved, (S, V))
        if number is not None and backend.name != "torch":
            grads = backend.backward(rows, x, saved, fs, needs, None, number)
        else:
            grads = backend.backward(rows, x, saved, fs, needs)
        found: list[Tensor | None] = [grads[0][0], None, None, None]
        for dY, grad in zip(dYs, grads, strict=True):
            # A layer whose output is unused gets no gradients, as if it were alone.
            found += _NONE[:count] if dY is None else grad[1 : count + 1]
        return tuple(found)


# Without the search of all arguments for dead wrappers of torch.func; and back without the method
# that chooses between backward and vjp.
_apply = super(torch.autograd.Function, AdaptedLinears).apply
_node: Any = AdaptedLinears
_node._backward_cls.apply = AdaptedLinears.backward
_differentiable_once = differentiable_once(AdaptedLinears.backward)


def _complete(dYs: Sequence[Tensor | None], fs: Sequence[Factors]) -> Sequence[Tensor | None]:
    """dY of every layer, zeros where an output is unused; none if all are."""
    used = [dY for dY in dYs if dY is not None]
    if len(used) in (0, len(dYs)):
        return used
    like = used[0]
    return [
        like.new_zeros(*like.shape[:-1], f.weight.shape[0]) if dY is None else dY
        for dY, f in zip(dYs, fs, strict=True)
    ]


def is_recording() -> bool:
    """Whether autograd, forward-mode autograd, torch.func or torch.jit is recording operations."""
    return (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


@functools.lru_cache(maxsize=256)
def _needs_of(
    needs_input_grad: tuple[bool, ...], layers: int
) -> tuple[tuple[Needs, ...], tuple[int, ...]]:
    """The gradients of every layer, by the arguments of apply() that need one, and which of its
    tensors no gradient reads: frozen biases."""
    needs_x, _, _, _, *rest = needs_input_grad
    count = len(rest) // layers
    starts = range(0, len(rest), count)
    needs = tuple(Needs(needs_x, *rest[i : i + count]) for i in starts)
    return needs, tuple(i + 1 for i in starts if not rest[i + 1])


_any_of = functools.lru_cache(maxsize=256)(needs_of_all)


def _with_number(f: Factors) -> Factors:
    """The factors with a tensor scaling folded into b, so that nothing waits for a GPU."""
    scaling: Any = f.constants.scaling
    check_scaling(scaling)
    f = f._replace(constants=f.constants._replace(scaling=1.0))
    if not isinstance(f.B, Tensor) or not (f.b is None or isinstance(f.b, Tensor)):
        return f  # refused later
    s = scaling.detach().reshape(()).to(device=f.B.device, dtype=torch.float32)
    b = s.expand(f.B.shape[0]) if f.b is None else f.b.float() * s
    return f._replace(b=b)


def _with_seed(x: Tensor, fs: Sequence[Factors], seed: int | Tensor | None) -> list[Factors]:
    """The factors with the seed of their mask, drawn here unless it is given; without dropout if
    there is no A."""
    if fs[0].A is None:
        return [f._replace(constants=f.constants._replace(dropout_p=0.0)) for f in fs]
    seed = draw_seed(x.device) if seed is None else seed
    return [f._replace(constants=f.constants._replace(dropout_seed=seed)) for f in fs]
