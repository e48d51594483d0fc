"""The operation as ``torch.library`` operators, which torch.compile traces without a graph break.

    lora_fast::adapted_linear           y = g ⊙ (x Wᵀ + s · b ⊙ ((d ⊙ (drop(x) Aᵀ)) Bᵀ)) + bias
    lora_fast::adapted_linear_backward  the gradients of what trains
    lora_fast::row_norms                ‖W_i + s (B A)_i‖₂ of every row, for DoRA

They call the backend as the autograd.Function does, with the same saved tensors. A 4-bit weight is
split into its tensors and sizes. Dropout's seed is a tensor, so that a graph draws it instead of
holding a constant: on x's device for kernels, which read it there, else on the CPU. Tensors that
are not saved are empty. Eager code does not use them: dispatching a custom operator costs more than
an autograd.Function.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.choice import BackendName, get_backend, uses_triton
from ..backends.selection import backend_for
from ..factors import Constants, Factors, Needs, Saved, saved_input
from ..four_bit.decoding import CODES
from ..nf4 import NF4Weight
from .seeds import seed_tensor

# An argument of every call with results that are saved, raised when results or arguments change:
# inductor finds a graph on disk by its code, and must find none that an older version has made.
REVISION = 2
_CPU = torch.device("cpu")
_TABLES = tuple(CODES)


class FlatWeight(NamedTuple):
    """W [N, K] in tensors and numbers: dense, or `data` packed in 4 bits with bitsandbytes' state.

    sizes: nothing, or [N, K, blocksize, that of the absmax values (0 unless they are quantised),
    index of the table in CODES].
    """

    data: Tensor
    absmax: Tensor | None
    code: Tensor | None
    offset: Tensor | None
    absmax2: Tensor | None
    code2: Tensor | None
    sizes: list[int]
    dtype: torch.dtype | None

    @classmethod
    def of(cls, weight: Tensor | NF4Weight) -> FlatWeight:
        if isinstance(weight, Tensor):
            return cls(weight, None, None, None, None, None, [], None)
        state = weight.quant_state
        second = state.state2 if state.nested else None
        return cls(
            weight.packed,
            state.absmax,
            state.code,
            state.offset if state.nested else None,
            None if second is None else second.absmax,
            None if second is None else second.code,
            [
                *(*state.shape, state.blocksize, 0 if second is None else second.blocksize),
                _TABLES.index(state.quant_type),
            ],
            state.dtype,
        )

    def shape(self) -> tuple[int, int]:
        N, K = self.sizes[:2] if self.sizes else self.data.shape
        return N, K

    def weight(self) -> Tensor | NF4Weight:
        if self.absmax is None:
            return self.data
        from bitsandbytes.functional import QuantState

        N, K, blocksize, blocksize2, table = self.sizes
        second = None
        if blocksize2:
            second = QuantState(
                absmax=self.absmax2, code=self.code2, blocksize=blocksize2, dtype=torch.float32
            )
        state = QuantState(
            absmax=self.absmax,
            shape=torch.Size((N, K)),
            code=self.code,
            blocksize=blocksize,
            quant_type=_TABLES[table],
            dtype=self.dtype,
            offset=self.offset,
            state2=second,
        )
        return NF4Weight(self.data, state)


_WEIGHT = (
    "Tensor weight, Tensor? absmax, Tensor? code, Tensor? offset, Tensor? absmax2, Tensor? code2, "
    "SymInt[] sizes, ScalarType? dtype"
)


class Operands(NamedTuple):
    """The arguments of forward and backward after the weight, in this order."""

    bias: Tensor | None
    A: Tensor | None
    B: Tensor | None
    b: Tensor | None
    d: Tensor | None
    g: Tensor | None
    seed: Tensor | None
    rank_spans: Tensor | None
    scaling: float
    dropout_p: float
    needs: list[bool]
    backend: BackendName
    revision: int = REVISION

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        return self.bias, self.A, self.B, self.b, self.d, self.g

    def factors(self, weight: Tensor | NF4Weight) -> Factors:
        seed = seed_of(self.seed, weight.device)
        constants = Constants(self.scaling, self.dropout_p, seed, self.rank_spans)
        return Factors(weight, self.bias, self.A, self.B, self.b, self.d, self.g, constants)


_OPERANDS = (
    f"{_WEIGHT}, Tensor? bias, Tensor? A, Tensor? B, Tensor? b, Tensor? d, Tensor? g, "
    "Tensor? seed, Tensor? rank_spans, float scaling, float dropout_p, bool[] needs, str backend, "
    "int revision"
)

_SAVED = "Tensor S, Tensor V"


def seed_of(seed: Tensor | None, device: torch.device) -> int | Tensor:
    """The seed as a backend takes it: where it lies, if that is the device of the kernels."""
    if seed is None:
        return 0
    return seed if seed.device == device else int(seed)


def _split(arguments: tuple[Any, ...]) -> tuple[FlatWeight, Operands]:
    length = len(FlatWeight._fields)
    return FlatWeight(*arguments[:length]), Operands(*arguments[length:])


def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    flat, operands = _split(arguments)
    f, needs = operands.factors(flat.weight()), Needs(*operands.needs)
    (y,), saved = backend_for(x.device, operands.backend).forward(x, [f], [needs])
    return y, *(x.new_empty(0) if t is None else t for t in saved)


def _fake_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    flat, operands = _split(arguments)
    needs, (N, _), M = Needs(*operands.needs), flat.shape(), math.prod(x.shape[:-1])
    S, V = (x.new_empty(0) for _ in Saved._fields)
    if needs.saves_S and operands.A is not None:
        S = x.new_empty(M, operands.A.shape[0])
    if needs.saves_V:
        V = x.new_empty(M, N)
    return x.new_empty(*x.shape[:-1], N), S, V


def _backward(dY: Tensor, x: Tensor | None, *arguments: Any) -> list[Tensor]:
    """The gradients that `needs` names, in its order."""
    flat, operands = _split(arguments[2:])
    # S and V have two dimensions, placeholders have one.
    saved = Saved(*(t if t.dim() == 2 else None for t in arguments[:2]))
    f, needs = operands.factors(flat.weight()), Needs(*operands.needs)
    backend = backend_for(dY.device, operands.backend)
    (grads,) = backend.backward([dY], x, saved, [f], [needs])
    return [grad.contiguous() for grad in grads if grad is not None]


def _fake_backward(dY: Tensor, x: Tensor | None, *arguments: Any) -> list[Tensor]:
    flat, operands = _split(arguments[2:])
    needs, factors = Needs(*operands.needs), (flat.data, *operands.vectors)
    grads = [dY.new_empty(*dY.shape[:-1], flat.shape()[1])] if needs.x else []
    wanted = zip(needs[1:], factors, strict=True)
    return grads + [
        factor.new_empty(factor.shape) for need, factor in wanted if need and factor is not None
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *arguments = inputs
    _, *saved = output
    operands = _split(tuple(arguments))[1]
    ctx.mark_non_differentiable(*saved)
    kept = [x if Needs(*operands.needs).saves_x else None, *saved]
    ctx.save_for_backward(*kept, *(a for a in arguments if isinstance(a, Tensor)))
    ctx.arguments = [None if isinstance(a, Tensor) else a for a in arguments]
    ctx.tensors = [isinstance(a, Tensor) for a in arguments]


def _autograd(ctx: Any, dY: Tensor, *_: Any) -> tuple[Any, ...]:
    x, S, V, *tensors = ctx.saved_tensors
    remaining = iter(tensors)
    arguments = [
        next(remaining) if is_tensor else a
        for is_tensor, a in zip(ctx.tensors, ctx.arguments, strict=True)
    ]
    found = iter(adapted_linear_backward(dY, x, S, V, *arguments))
    needs = _split(tuple(arguments))[1].needs
    dX, dW, *vectors = (next(found) if need else None for need in needs)
    after_weight = [None] * (len(FlatWeight._fields) - 1)
    after_vectors = [None] * (len(Operands._fields) - len(vectors))
    return dX, dW, *after_weight, *vectors, *after_vectors


def _row_norms(*arguments: Any) -> Tensor:
    *flat, A, B, scaling, backend = arguments
    weight = FlatWeight(*flat).weight()
    return backend_for(A.device, backend).row_norms(weight, A, B, scaling)


def _fake_row_norms(*arguments: Any) -> Tensor:
    B = arguments[len(FlatWeight._fields) + 1]
    return B.new_empty(B.shape[0], dtype=torch.float32)


def registered(name: str, schema: str, compute: Any, fake: Any) -> Any:
    """lora_fast::name with this schema."""
    op = torch.library.custom_op(f"lora_fast::{name}", compute, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op


adapted_linear_backward = registered(
    "adapted_linear_backward",
    f"(Tensor dY, Tensor? x, {_SAVED}, {_OPERANDS}) -> Tensor[]",
    _backward,
    _fake_backward,
)
adapted_linear = registered(
    "adapted_linear",
    f"(Tensor x, {_OPERANDS}) -> (Tensor y, {_SAVED})",
    _forward,
    _fake_forward,
)
adapted_linear.register_autograd(_autograd, setup_context=_setup_context)
_row_norms_op = registered(
    "row_norms",
    f"({_WEIGHT}, Tensor A, Tensor B, float scaling, str backend) -> Tensor",
    _row_norms,
    _fake_row_norms,
)


def apply(x: Tensor, f: Factors, dropout_seed: int | Tensor | None) -> Tensor:
    """y of `lora_fast::adapted_linear`."""
    weight, *vectors, constants = f
    name, flat = get_backend(), FlatWeight.of(weight)
    seed, needs = seed_in_graph(x, f, dropout_seed, name), enabled_needs(x, flat.data, *vectors)
    p = 0.0 if seed is None else constants.dropout_p
    drawn = Constants(constants.scaling, p, 0, constants.rank_spans)
    copies = not uses_triton(x.device, name)
    saved = saved_input(x, drawn, Needs(*needs), copies=copies)
    # The operator saves its input: the copy, where there is one.
    read = x if saved is None else saved
    y, *_ = adapted_linear(
        read,
        *flat,
        *vectors,
        seed,
        constants.rank_spans,
        constants.scaling,
        p,
        needs,
        name,
        REVISION,
    )
    return y


def seed_in_graph(
    x: Tensor, f: Factors, dropout_seed: int | Tensor | None, name: BackendName
) -> Tensor | None:
    """The seed of the mask of x; None without dropout."""
    if f.constants.dropout_p == 0.0 or f.A is None:
        return None
    return seed_tensor(dropout_seed, x.device if uses_triton(x.device, name) else _CPU)


def enabled_needs(*tensors: Tensor | None) -> list[bool]:
    """Whether each of the tensors gets a gradient."""
    enabled = torch.is_grad_enabled()
    return [enabled and t is not None and t.requires_grad for t in tensors]


def row_norms(weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """‖W_i + s (B A)_i‖₂ [N] in float32, without a gradient."""
    return _row_norms_op(*FlatWeight.of(weight), A, B, scaling, get_backend())
