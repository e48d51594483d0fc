"""Checks of users' arguments; messages name the argument, what it must be and what it is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..factors import Factors
from ..gated import ACTIVATIONS
from ..nf4 import NF4Weight

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_operands(x: Any, f: Factors) -> None:
    """Raise TypeError or ValueError unless x and the factors fit together, whatever they are."""
    weight: Any = f.weight
    # Before every call: what is one comparison is made here, helpers only word the errors.
    if not isinstance(x, Tensor) or x.dtype not in FLOATING:
        raise not_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension [..., K], got a scalar")
    if x.device.type == "meta":
        raise ValueError("x must be on a device that computes, got meta: count with fake tensors")
    if not isinstance(weight, NF4Weight):
        if getattr(weight, "quant_state", None) is not None:
            raise TypeError(
                "weight must be a dense tensor or an NF4Weight, got a bitsandbytes Params4bit; "
                "wrap it with NF4Weight.from_params4bit(weight)"
            )
        if not isinstance(weight, Tensor) or weight.dtype not in FLOATING:
            raise not_floating("weight", weight)
    shape = weight.shape
    if len(shape) != 2:
        raise ValueError(f"weight must have shape [N, K], got {tuple(shape)}")
    N, K = shape
    if N == 0 or K == 0:
        raise ValueError(f"weight must have N ≥ 1 and K ≥ 1, got {tuple(shape)}")
    if x.shape[-1] != K:
        raise ValueError(
            f"x must have K = {K} features like weight [N, K] = {tuple(shape)}, "
            f"got {tuple(x.shape)}"
        )
    if weight.device != x.device:
        raise elsewhere("weight", weight, x)
    R = _check_low_rank(f.A, f.B, N, K, x)
    for name, vector in (("bias", f.bias), ("b", f.b), ("d", f.d), ("g", f.g)):
        if vector is not None:
            _check_vector(name, vector, R if name == "d" else N, x, needs_adapter=R is None)
    check_scaling(f.constants.scaling)
    if f.constants.rank_spans is not None:
        _check_rank_spans(f.constants.rank_spans, x, f.A)


def check_dropout(p: Any, seed: Any, x: Tensor) -> None:
    """Raise unless `p` is a probability and `seed` None, a non-negative integer below 2⁶³, or an
    int64 tensor of one element on x's device."""
    if type(p) is not float or not 0.0 <= p <= 1.0:
        check_probability("dropout_p", p)
    if seed is None:
        return
    if isinstance(seed, Tensor):
        _check_seed_tensor(seed, x)
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"dropout_seed must be an integer, got {type(seed).__name__}")
    elif not 0 <= seed < 2**63:
        raise ValueError(f"dropout_seed must lie in [0, 2**63), got {seed}")


def check_gated(x: Any, gate: Any, up: Any, down: Any, activation: Any, seeds: Any) -> None:
    """Raise TypeError or ValueError unless x, the linears of a gated MLP or outputs of gate and up,
    and the seeds of the masks of x and of h fit together."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if not isinstance(x, Tensor) or x.dtype not in FLOATING:
        raise not_floating("x", x)
    if not isinstance(down, Factors | None):
        raise TypeError(f"down must be a layer or None, got {type(down).__name__}")
    width = _width_of("gate", gate, x, seeds[0])
    if up is not None:
        of_up = _width_of("up", up, x, seeds[0])
        if of_up != width:
            raise ValueError(f"up must have as many features as gate, {width}, got {of_up}")
    elif width % 2:
        raise ValueError(f"gate without up must have an even number of features, got {width}")
    else:
        width //= 2
    if down is not None:
        shape = down.weight.shape
        if len(shape) == 2 and shape[1] != width:
            raise ValueError(f"down must have a weight [N, I] with I = {width}, got {tuple(shape)}")
        _check_layer("down", x.new_empty(0, width), down, seeds[1])


def _width_of(name: str, member: Any, x: Tensor, seed: Any) -> int:
    """The features of gate or up: a layer that reads x, or its output."""
    if isinstance(member, Factors):
        _check_layer(name, x, member, seed)
        return int(member.weight.shape[0])
    if not isinstance(member, Tensor) or member.dtype not in FLOATING:
        raise not_floating(name, member)
    if member.dim() != x.dim() or member.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{name} must have shape [..., I] with the leading dimensions of x "
            f"{tuple(x.shape[:-1])}, got {tuple(member.shape)}"
        )
    if member.device != x.device:
        raise elsewhere(name, member, x)
    return member.shape[-1]


def _check_layer(name: str, x: Tensor, f: Factors, seed: Any) -> None:
    try:
        check_operands(x, f)
        check_dropout(f.constants.dropout_p, seed, x)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _check_seed_tensor(seed: Tensor, x: Tensor) -> None:
    if seed.dtype != torch.int64 or seed.numel() != 1:
        kind = f"{seed.dtype} of shape {tuple(seed.shape)}"
        raise TypeError(f"dropout_seed must be an integer or one int64 in a tensor, got {kind}")
    if seed.device != x.device:
        raise elsewhere("dropout_seed", seed, x)


def _check_rank_spans(spans: Any, x: Tensor, A: Any) -> None:
    """Raise unless `spans` is [samples, 2] int32 with equally many rows of x a sample."""
    if not isinstance(spans, Tensor) or spans.dtype != torch.int32:
        kind = spans.dtype if isinstance(spans, Tensor) else type(spans).__name__
        raise TypeError(f"rank_spans must be an int32 tensor, got {kind}")
    if A is None:
        raise ValueError("rank_spans must be None when there is no adapter (A and B are None)")
    if spans.dim() != 2 or spans.shape[1] != 2:
        raise ValueError(f"rank_spans must have shape [samples, 2], got {tuple(spans.shape)}")
    rows = x.numel() // x.shape[-1]
    if rows and (spans.shape[0] == 0 or rows % spans.shape[0]):
        raise ValueError(
            f"rank_spans must have a number of samples that divides the {rows} rows of x, "
            f"got {spans.shape[0]}"
        )
    if spans.device != x.device:
        raise elsewhere("rank_spans", spans, x)


def check_scaling(scaling: Any) -> None:
    """Raise unless `scaling` is a finite number, or a tensor of one element without gradient."""
    if isinstance(scaling, Tensor):
        if scaling.numel() != 1:
            raise ValueError(f"scaling must be one number, got shape {tuple(scaling.shape)}")
        if scaling.requires_grad:
            raise ValueError(
                "scaling must not require a gradient, got a tensor that does; a scaling that "
                "trains is d = scaling.expand(R), or b = scaling.expand(N)"
            )
    elif isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling must be a number, got {type(scaling).__name__}")
    # Not math.isfinite, which takes no number of torch.compile's.
    elif not -math.inf < scaling < math.inf:
        raise ValueError(f"scaling must be finite, got {scaling}")


def check_probability(name: str, p: Any) -> None:
    """Raise unless 0 ≤ p ≤ 1."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(p).__name__}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {p}")


def _check_low_rank(A: Any, B: Any, N: int, K: int, x: Tensor) -> int | None:
    if (A is None) != (B is None):
        given, missing = ("A", "B") if B is None else ("B", "A")
        raise ValueError(f"{missing} must be given when {given} is: the adapter is the product B A")
    if A is None:
        return None
    for name, factor in (("A", A), ("B", B)):
        if not isinstance(factor, Tensor) or factor.dtype not in FLOATING:
            raise not_floating(name, factor)
        if factor.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, got shape {tuple(factor.shape)}")
        if factor.device != x.device:
            raise elsewhere(name, factor, x)
    R = int(A.shape[0])
    if R < 1:
        raise ValueError(f"A must have rank R ≥ 1, got shape {tuple(A.shape)}")
    if A.shape[1] != K:
        raise ValueError(f"A must have shape [R, K] with K = {K}, got {tuple(A.shape)}")
    if B.shape != (N, R):
        raise ValueError(f"B must have shape [N, R] = ({N}, {R}), got {tuple(B.shape)}")
    return R


def _check_vector(
    name: str, vector: Any, size: int | None, x: Tensor, *, needs_adapter: bool
) -> None:
    if not isinstance(vector, Tensor) or vector.dtype not in FLOATING:
        raise not_floating(name, vector)
    if needs_adapter and name in ("b", "d"):
        raise ValueError(f"{name} must be None when there is no adapter (A and B are None)")
    if vector.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {tuple(vector.shape)}")
    if vector.device != x.device:
        raise elsewhere(name, vector, x)


def not_floating(name: str, value: Any) -> TypeError:
    if not isinstance(value, Tensor):
        return TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {value.dtype}")


def elsewhere(name: str, value: Tensor | NF4Weight, x: Tensor) -> ValueError:
    return ValueError(f"{name} must be on x's device {x.device}, got {value.device}")
