"""Checks of users' operands of experts; messages name the argument, what it must be and what it
is."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..experts.nf4_experts import NF4Experts
from ..experts.operands import Projection
from .validation import FLOATING, check_scaling, elsewhere, not_floating

_INDEX = (torch.int32, torch.int64)


def check_projection(p: Projection, x: Tensor, prefix: str = "") -> None:
    """Raise TypeError or ValueError unless the factors of `p` fit together, with x's device."""
    weight: Any = p.weight
    name = f"{prefix}weight"
    if not isinstance(weight, NF4Experts):
        if not isinstance(weight, Tensor) or weight.dtype not in FLOATING:
            raise not_floating(name, weight)
        if weight.requires_grad:
            raise ValueError(f"{name} must be frozen, got one that requires a gradient")
    shape = tuple(weight.shape)
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"{name} must have shape [E, N, K] of positive sizes, got {shape}")
    if weight.device != x.device:
        raise elsewhere(name, weight, x)
    E, N, K = shape
    if (p.A is None) != (p.B is None):
        given, missing = ("A", "B") if p.B is None else ("B", "A")
        raise ValueError(
            f"{prefix}{missing} must be given when {prefix}{given} is: the adapter is B A"
        )
    R = p.A.shape[1] if isinstance(p.A, Tensor) and p.A.dim() == 3 else "R"
    _check_factor(f"{prefix}bias", p.bias, "[E, N]", (E, N), x)
    _check_factor(f"{prefix}A", p.A, "[E, R, K]", (E, R, K), x)
    _check_factor(f"{prefix}B", p.B, "[E, N, R]", (E, N, R), x)
    if R == 0:
        raise ValueError(f"{prefix}A must have rank R ≥ 1, got shape {tuple(p.A.shape)}")  # type: ignore[union-attr]
    if isinstance(p.scaling, Tensor):
        raise TypeError(f"{prefix}scaling must be a number, got a tensor")
    check_scaling(p.scaling)


def _check_factor(name: str, factor: Any, letters: str, shape: tuple[Any, ...], x: Tensor) -> None:
    if factor is None:
        return
    if not isinstance(factor, Tensor) or factor.dtype not in FLOATING:
        raise not_floating(name, factor)
    if tuple(factor.shape) != shape:
        words = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape {letters} = ({words}), got {tuple(factor.shape)}")
    if factor.device != x.device:
        raise elsewhere(name, factor, x)


def check_block(first: Projection, second: Projection, *, halves: bool) -> None:
    """Raise unless both have equally many experts and, where the gate halves its rows, the second
    reads half of what the first makes."""
    E, P, _ = first.weight.shape
    if second.weight.shape[0] != E:
        raise ValueError(
            f"second.weight must have E = {E} experts like first.weight, "
            f"got {second.weight.shape[0]}"
        )
    if halves and 2 * second.weight.shape[2] != P:
        raise ValueError(
            f"second.weight must have K = {P / 2:g}, half of first.weight's N = {P}, "
            f"got {second.weight.shape[2]}"
        )


def check_rows(name: str, x: Any, features: int | None = None) -> None:
    """Raise unless x is a floating matrix [T, features]."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATING:
        raise not_floating(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {tuple(x.shape)}")
    if features is not None and x.shape[1] != features:
        raise ValueError(f"{name} must have {features} features, got shape {tuple(x.shape)}")


def check_offsets(offsets: Any, experts: int, x: Tensor) -> None:
    """Raise unless offsets [E] rise from ≥ 0 to ≤ T; their values are not read on a GPU."""
    _check_index("expert_offsets", offsets, x)
    if tuple(offsets.shape) != (experts,):
        raise ValueError(
            f"expert_offsets must have shape [E] = ({experts},), got {tuple(offsets.shape)}"
        )
    if x.device.type != "cpu":
        return
    values = [0, *offsets.tolist(), x.shape[0]]
    if any(a > b for a, b in itertools.pairwise(values)):
        raise ValueError(
            f"expert_offsets must rise from 0 to the {x.shape[0]} rows of x, got {values[1:-1]}"
        )


def check_routing(index: Any, weights: Any, x: Tensor) -> None:
    """Raise unless top_k_index and top_k_weights are [T, k] for x [T, H]; values of the index are
    not read on a GPU."""
    _check_index("top_k_index", index, x)
    if index.dim() != 2 or index.shape[0] != x.shape[0]:
        raise ValueError(
            f"top_k_index must have shape [T, k] with T = {x.shape[0]}, got {tuple(index.shape)}"
        )
    if not isinstance(weights, Tensor) or weights.dtype not in FLOATING:
        raise not_floating("top_k_weights", weights)
    if weights.shape != index.shape:
        raise ValueError(
            f"top_k_weights must have the shape of top_k_index {tuple(index.shape)}, "
            f"got {tuple(weights.shape)}"
        )
    if weights.device != x.device:
        raise elsewhere("top_k_weights", weights, x)
    if x.device.type == "cpu" and index.numel() and int(index.min()) < 0:
        raise ValueError(f"top_k_index must not be negative, got {int(index.min())}")


def _check_index(name: str, index: Any, x: Tensor) -> None:
    if not isinstance(index, Tensor) or index.dtype not in _INDEX:
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {kind}")
    if index.device != x.device:
        raise elsewhere(name, index, x)
