"""The operation, for one layer or several that read the same x, and its gradients.

Saved for backward, beside parameters: x if A (or W) trains, S = drop(x) Aᵀ if B, b or d trains, V =
(y − bias) / g if g trains. For dropout the seed is saved; on the torch backend also a copy of x,
which the caller may change in place as with PEFT, and the mask, one byte per element. An NF4 weight
stays packed and is decoded again, except where checkpointing recomputes (:mod:`recomputation`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from ..backends.protocol import Backend
from ..backends.selection import backend_for
from ..factors import Constants, Factors, Needs, Saved, needs_of_all, saved_input
from ..geometry import Geometry
from ..nf4 import NF4Weight
from . import compiled_groups, compiled_ops, recomputation
from .seeds import draw_seed
from .validation import check_dropout, check_operands, check_scaling

# Tensors of one layer among the arguments of apply(): all that may need a gradient except x.
_PER_LAYER = len(Needs._fields) - 1
_NOTHING = Needs()


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
        return _run(AdaptedLinears.apply, x, layers, dropout_seed)
    return run(torch._C._functorch.unwrap_if_dead(x), layers, dropout_seed)


def run(
    x: Tensor,
    layers: Sequence[Factors],
    dropout_seed: int | Tensor | None = None,
    geometry: Geometry | None = None,
) -> Sequence[Tensor]:
    """:func:`compute` for operands that are known to fit together, x in the compute dtype, and
    numbers as scalings, outside of torch.func and torch.compile.

    `geometry` is that of one plain layer, where it is known. This and what it calls run for each
    layer of each step: a call of a Python function here is 0.1 µs of the host's time, a new tensor,
    a view too, 0.7 µs.
    """
    return _run(_apply, x, layers, dropout_seed, geometry)


def _run(
    apply: Any,
    x: Tensor,
    layers: Sequence[Factors],
    dropout_seed: int | Tensor | None,
    geometry: Geometry | None = None,
) -> Sequence[Tensor]:
    if layers[0].constants.dropout_p > 0.0:
        layers = _with_seed(x, layers, dropout_seed)
    backend = backend_for(x.device)
    if not is_recording():
        planned: Any = backend
        known = {} if geometry is None or backend.name == "torch" else {"geometry": geometry}
        return planned.forward(x, layers, (_NOTHING,) * len(layers), **known)[0]
    tensors: list[Any] = []
    for f in layers:
        tensors += f[:_PER_LAYER] if isinstance(f[0], Tensor) else (None, *f[1:_PER_LAYER])
    return apply(x, layers, backend, geometry, *tensors)


class AdaptedLinears(torch.autograd.Function):
    """apply(x, fs, backend, geometry, weight_1, bias_1, A_1, B_1, b_1, d_1, g_1, weight_2, …) → y_1
    …: x [..., K] is in the compute dtype, all else in its own; the tensors are those of fs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        fs: Sequence[Factors],
        backend: Backend,
        geometry: Geometry | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        needs = _needs_of(ctx.needs_input_grad)
        packed, read_by = False, fs
        for f in fs:
            packed = packed or not isinstance(f[0], Tensor)
        ctx.saves_weights = packed and needs[0].x and recomputation.is_checkpointed_or_recomputed()
        if ctx.saves_weights:
            read_by = recomputation.remembering(fs)
        if geometry is None or backend.name == "torch":
            ys, saved = backend.forward(x, read_by, needs)
        else:
            planned: Any = backend
            ys, saved = planned.forward(x, fs, needs, geometry=geometry)
        need = needs[0] if len(needs) == 1 else needs_of_all(needs)
        read = saved_input(x, fs[0].constants, need, copies=backend.copies_input)
        # A number stays with the constants.
        drawn = fs[0][-1].dropout_seed
        seed = drawn if isinstance(drawn, Tensor) else None
        weights = recomputation.saved_weights(read_by, x) if ctx.saves_weights else ()
        ctx.save_for_backward(read, *saved, seed, *tensors, *weights)
        ctx.backend, ctx.others = backend, [_unsaved(f, seed) for f in fs]
        if len(fs) > 1:
            ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dYs: Tensor | None) -> tuple[Tensor | None, ...]:
        # With create_graph=True a second derivative raises.
        return (_differentiable_once if torch.is_grad_enabled() else _gradients)(ctx, *dYs)


# Without the search of all arguments for dead wrappers of torch.func.
_apply = super(torch.autograd.Function, AdaptedLinears).apply


def _unsaved(f: Factors, seed: Tensor | None) -> tuple[NF4Weight | None, Constants]:
    """What backward needs of a layer beside the tensors that autograd saves."""
    constants = f[-1] if seed is None else f[-1]._replace(dropout_seed=0)
    return None if isinstance(f[0], Tensor) else f[0], constants


def _gradients(ctx: Any, *dYs: Tensor | None) -> tuple[Tensor | None, ...]:
    needs, others = _needs_of(ctx.needs_input_grad), ctx.others
    like = next((dY for dY in dYs if dY is not None), None)
    if like is None:
        return (None,) * len(ctx.needs_input_grad)
    x, S, V, mask, seed, *tensors = ctx.saved_tensors
    fs: list[Factors] = []
    rows, start = [], 0
    for dY, (packed, constants) in zip(dYs, others, strict=True):
        if seed is not None:
            constants = constants._replace(dropout_seed=seed)
        W, bias, A, B, b, d, g = tensors[start : start + _PER_LAYER]
        start += _PER_LAYER
        f = Factors(packed if W is None else W, bias, A, B, b, d, g, constants)
        fs.append(f)
        rows.append(like.new_zeros(*like.shape[:-1], f.weight.shape[0]) if dY is None else dY)
    if ctx.saves_weights:
        fs = recomputation.with_saved(fs, tensors[start:])
    grads = ctx.backend.backward(rows, x, Saved(S, V, mask), fs, needs)
    found: list[Tensor | None] = [grads[0].x, None, None, None]
    for dY, grad in zip(dYs, grads, strict=True):
        # A layer whose output is unused gets no gradients, as if it were alone.
        found += [None] * _PER_LAYER if dY is None else grad[1:]
    return tuple(found)


_differentiable_once = once_differentiable(_gradients)


def is_recording() -> bool:
    """Whether autograd, forward-mode autograd, torch.func or torch.jit is recording operations."""
    return (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


@functools.lru_cache(maxsize=256)
def _needs_of(needs_input_grad: tuple[bool, ...]) -> tuple[Needs, ...]:
    """The gradients of every layer, by the arguments of apply() that need one."""
    needs_x, _, _, _, *rest = needs_input_grad
    layers = range(0, len(rest), _PER_LAYER)
    return tuple(Needs(needs_x, *rest[i : i + _PER_LAYER]) for i in layers)


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
