"""The operation itself, for those who have their own modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends.choice import get_backend
from .factors import Constants, Factors, Needs
from .nf4 import NF4Weight
from .operation import compiled_ops
from .operation.autograd import (
    AdaptedLinear,
    AdaptedLinearGroup,
    forward,
    forward_group,
    group_factors,
    is_recording,
)
from .operation.validation import check_adapted_linear, check_dropout, check_rank_spans


def adapted_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None = None,
    *,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    b: Tensor | None = None,
    d: Tensor | None = None,
    g: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    rank_spans: Tensor | None = None,
) -> Tensor:
    """y = g ⊙ (x Wᵀ + s · b ⊙ ((d ⊙ (drop(x) Aᵀ)) Bᵀ)) + bias, fused forward and backward.

    x [..., K] · weight [N, K], dense or :class:`NF4Weight` · bias, b, g [N] · A [R, K] · B [N, R] ·
    d [R] → y [..., N]. Absent factors cost nothing. The compute dtype, and y's, is autocast's where
    autocast is on, else x's; products accumulate in float32; gradients arrive in the dtype of their
    factor. ``scaling`` may be a tensor of one element, which is read on its device and must not
    require a gradient: d and b are the factors that have one. ``dropout_p`` drops elements of x on
    their way into A, with a mask that is a pure function of ``dropout_seed``, row and column;
    without a seed one is drawn from torch's generator of x's device. ``rank_spans`` [samples, 2]
    (int32) gives samples of one batch different adapters, stacked along R: sample i, the i-th of
    equal parts of the rows of x, takes part in columns start ≤ r < stop of S alone.

    Raises TypeError or ValueError that names the argument for operands that do not fit together.
    Differentiating twice raises RuntimeError.
    Sources: LoRA (Hu et al. 2021, eq. 3), QLoRA (Dettmers et al. 2023, eq. 5), VeRA (Kopiczko et
    al. 2023, eq. 2: b, d), DoRA (Liu et al. 2024, eq. 5: g), IA3 (Liu et al. 2022: g).
    """
    check_adapted_linear(x, weight, {"bias": bias, "b": b, "d": d, "g": g}, A, B, scaling)
    check_dropout(dropout_p, dropout_seed)
    if rank_spans is not None:
        check_rank_spans(rank_spans, x, A)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if isinstance(scaling, Tensor):
        b = _scaled_gain(scaling, b, B)
        scaling = 1.0
    if A is None:
        dropout_p = 0.0
    if torch.compiler.is_compiling():
        seed = compiled_ops.seed_of(dropout_p, dropout_seed)
        vectors = (bias, A, B, b, d, g)
        return compiled_ops.apply(x, weight, vectors, scaling, dropout_p, seed, rank_spans)
    if dropout_p > 0.0 and dropout_seed is None:
        dropout_seed = _draw_seed(x.device)
    constants = Constants(float(scaling), float(dropout_p), dropout_seed or 0, rank_spans)
    backend = get_backend()
    if is_recording():
        return AdaptedLinear.apply(x, weight, bias, A, B, b, d, g, constants, backend)
    return forward(x, Factors(weight, bias, A, B, b, d, g, *constants), Needs(), backend)[0]


class Member(NamedTuple):
    """One of several plain LoRA layers that read the same x: y = x Wᵀ + s · (x Aᵀ) Bᵀ + bias."""

    weight: Tensor | NF4Weight
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scaling: float = 1.0


def adapted_linears(
    x: Tensor,
    members: Sequence[Member],
    *,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
) -> tuple[Tensor, ...]:
    """y_i = x W_iᵀ + s_i · (drop(x) A_iᵀ) B_iᵀ + bias_i for several layers that read the same x.

    x [..., K] · weight [N_i, K] · bias [N_i] · A [R_i, K] · B [N_i, R_i] → y_i [..., N_i]. The
    numbers are those of :func:`adapted_linear`, up to rounding, but x is read once by one shrink
    for all A_i, once by one product for all of their gradients, and the gradient of x is one sum.
    drop(x) is one and the same for all members.
    The weights must be frozen. An output that leads to no loss leaves its layer without gradients.

    Raises as :func:`adapted_linear` does, and ValueError without members or for trained weights.
    """
    check_dropout(dropout_p, dropout_seed)
    if not members:
        raise ValueError("members must hold at least one layer, got none")
    for member in members:
        none: dict[str, Any] = {"b": None, "d": None, "g": None}
        vectors = {"bias": member.bias, **none}
        check_adapted_linear(x, member.weight, vectors, member.A, member.B, member.scaling)
        if member.A is None or isinstance(member.scaling, Tensor):
            raise ValueError("members must have A and B and a scaling that is a number")
        if isinstance(member.weight, Tensor) and member.weight.requires_grad:
            raise ValueError("members must have frozen weights, got one that requires a gradient")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.compiler.is_compiling():
        seed = compiled_ops.seed_of(dropout_p, dropout_seed)
        return tuple(
            compiled_ops.apply(x, W, (bias, A, B, None, None, None), s, dropout_p, seed, None)
            for W, bias, A, B, s in members
        )
    if dropout_p > 0.0 and dropout_seed is None:
        dropout_seed = _draw_seed(x.device)
    weights: list[Any] = []
    constants: list[Constants] = []
    vectors_of_all: list[Tensor | None] = []
    for W, bias, A, B, s in members:
        weights.append(W)
        constants.append(Constants(float(s), float(dropout_p), dropout_seed or 0))
        vectors_of_all += (bias, A, B)
    backend = get_backend()
    if is_recording():
        return AdaptedLinearGroup.apply(x, weights, constants, backend, *vectors_of_all)
    return forward_group(x, group_factors(weights, constants, vectors_of_all), backend)[0]


def _scaled_gain(scaling: Tensor, b: Tensor | None, B: Tensor | None) -> Tensor | None:
    """s as part of b, so that a scaling on the GPU is never waited for."""
    if B is None:
        return None
    s = scaling.detach().reshape(()).to(device=B.device, dtype=torch.float32)
    return s.expand(B.shape[0]) if b is None else b.float() * s


def _draw_seed(device: torch.device) -> int:
    """A seed from torch's generator of `device`, whose state advances; CUDA is not waited for."""
    if device.type != "cuda":
        return int(torch.randint(2**62, (), device=device))
    if torch.cuda.is_current_stream_capturing():
        raise NotImplementedError(
            "dropout_p must be 0 while a CUDA graph is captured, or dropout_seed given: "
            "every replay would use the same mask"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return (generator.initial_seed() * 0x9E3779B97F4A7C15 + offset) % 2**62
