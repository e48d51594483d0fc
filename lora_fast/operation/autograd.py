"""The operation, for one layer or several that read the same x, and its gradients.

Saved for backward, beside parameters: x if A (or W) trains, S = drop(x) Aᵀ if B, b or d trains, V =
(y − bias) / g if g trains. For dropout the seed is saved; on the torch backend also a copy of x,
which the caller may change in place as with PEFT, and the mask, one byte per element. An NF4 weight
stays packed and is decoded again, except where checkpointing recomputes (:mod:`recomputation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from ..backends.protocol import Backend
from ..backends.selection import backend_for
from ..factors import Factors, Needs, Saved, needs_of_all, saved_input
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
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.compiler.is_compiling():
        if len(layers) == 1:
            return [compiled_ops.apply(x, layers[0], dropout_seed)]
        return compiled_groups.apply(x, layers, dropout_seed)
    if layers[0].constants.dropout_p > 0.0:
        layers = _with_seed(x, layers, dropout_seed)
    backend = backend_for(x.device)
    if not is_recording():
        return backend.forward(x, layers, [_NOTHING] * len(layers))[0]
    tensors: list[Any] = []
    for f in layers:
        tensors += (f.weight if isinstance(f.weight, Tensor) else None, *f[1:_PER_LAYER])
    return AdaptedLinears.apply(x, layers, backend, *tensors)


class AdaptedLinears(torch.autograd.Function):
    """apply(x, fs, backend, weight_1, bias_1, A_1, B_1, b_1, d_1, g_1, weight_2, …) → y_1, y_2, …;
    x [..., K] is in the compute dtype, everything else in its own; the tensors are those of fs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fs: Sequence[Factors], backend: Backend, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        needs = _needs_of(ctx, len(fs))
        reads_packed = False
        for f in fs:
            reads_packed = reads_packed or (needs[0].x and not isinstance(f.weight, Tensor))
        ctx.saves_weights = reads_packed and recomputation.is_checkpointed_or_recomputed()
        read_by = recomputation.remembering(fs) if ctx.saves_weights else fs
        ys, saved = backend.forward(x, read_by, needs)
        need = needs[0] if len(needs) == 1 else needs_of_all(needs)
        read = saved_input(x, fs[0].constants, need, copies=backend.copies_input)
        # A number stays with the constants.
        seed = fs[0].constants.dropout_seed
        weights = recomputation.saved_weights(read_by, x) if ctx.saves_weights else []
        kept = seed if isinstance(seed, Tensor) else None
        ctx.save_for_backward(read, *saved, kept, *tensors, *weights)
        ctx.backend, ctx.others = backend, []
        for f in fs:
            packed = None if isinstance(f.weight, Tensor) else f.weight
            constants = f.constants
            if isinstance(seed, Tensor):
                constants = constants._replace(dropout_seed=0)
            ctx.others.append((packed, constants))
        ctx.set_materialize_grads(len(fs) == 1)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dYs: Tensor | None) -> tuple[Tensor | None, ...]:
        like = next((dY for dY in dYs if dY is not None), None)
        if like is None:
            return (None,) * len(ctx.needs_input_grad)
        x, S, V, mask, seed, *tensors = ctx.saved_tensors
        fs: list[Factors] = []
        rows = []
        for i, (dY, (packed, constants)) in enumerate(zip(dYs, ctx.others, strict=True)):
            if seed is not None:
                constants = constants._replace(dropout_seed=seed)
            W, bias, A, B, b, d, g = tensors[i * _PER_LAYER : (i + 1) * _PER_LAYER]
            f = Factors(packed if W is None else W, bias, A, B, b, d, g, constants)
            fs.append(f)
            rows.append(like.new_zeros(*like.shape[:-1], f.weight.shape[0]) if dY is None else dY)
        if ctx.saves_weights:
            fs = recomputation.with_saved(fs, tensors[len(fs) * _PER_LAYER :])
        needs = _needs_of(ctx, len(fs))
        grads = ctx.backend.backward(rows, x, Saved(S, V, mask), fs, needs)
        found: list[Tensor | None] = [grads[0].x, None, None]
        for dY, grad in zip(dYs, grads, strict=True):
            # A layer whose output is unused gets no gradients, as if it were alone.
            found += [None] * _PER_LAYER if dY is None else grad[1:]
        return tuple(found)


def is_recording() -> bool:
    """Whether autograd, forward-mode autograd, torch.func or torch.jit is recording operations."""
    return (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def _needs_of(ctx: Any, layers: int) -> list[Needs]:
    needs_x, _, _, *rest = ctx.needs_input_grad
    needs = []
    for i in range(0, layers * _PER_LAYER, _PER_LAYER):
        needs.append(Needs(needs_x, *rest[i : i + _PER_LAYER]))
    return needs


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
