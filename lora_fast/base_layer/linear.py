"""The frozen linear layer under an adapter: ``nn.Linear``, or bitsandbytes' ``Linear4bit`` in
NF4 or FP4.

    y = g ⊙ (x Wᵀ + s · b ⊙ ((d ⊙ (drop(x) Aᵀ)) Bᵀ)) + bias

No state is kept between calls: the weight and its quantisation state may be replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import four_bit
from ..experts.storage import packed_parameters
from ..factors import Constants, Factors
from ..four_bit import is_four_bit, restore_quant_state
from ..functional import Member, adapted_linears
from ..nf4 import NF4Weight
from ..operation.autograd import compute


def adapted(
    base: Any,
    x: Tensor,
    *,
    bias: Tensor | None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    b: Tensor | None = None,
    d: Tensor | None = None,
    g: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    rank_spans: Tensor | None = None,
) -> Tensor:
    """The equation on the weight of `base`: x [..., K] → y [..., N], `bias` in place of its own.

    The factors are those of :func:`lora_fast.functional.adapted_linear`. The result has the dtype
    that `base` alone would give: the compute dtype for a dense layer, x's for a 4-bit one. Call it
    only when ``base_obstacle`` and ``call_obstacle`` of obstacles.py find nothing.
    """
    constants = Constants(scaling, dropout_p, 0, rank_spans)  # type: ignore[arg-type]
    if type(base) is nn.Linear or not isinstance(base, four_bit.classes or four_bit.find()):
        return compute(x, [Factors(weight_of(base), bias, A, B, b, d, g, constants)])[0]
    dtype, given = four_bit_dtype(base, x), x.dtype
    x = x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)
    weight = NF4Weight.view(base.weight.data, base.weight.quant_state)
    return compute(x, [Factors(weight, bias, A, B, b, d, g, constants)])[0].to(given)


def adapted_together(
    bases: Sequence[Any], x: Tensor, members: Sequence[Member], dropout_p: float
) -> list[Tensor] | None:
    """:func:`adapted` for several bases that read the same x; None if their dtypes differ."""
    first, packed = bases[0], isinstance(bases[0], four_bit.classes or four_bit.find())
    dtype = four_bit_dtype(first, x) if packed else x.dtype
    for base in bases:
        if base.weight.dtype != first.weight.dtype or isinstance(base, four_bit.classes) != packed:
            return None
        if packed and four_bit_dtype(base, x) != dtype:
            return None
    if not packed:
        return list(adapted_linears(x, members, dropout_p=dropout_p))
    autocast = torch.is_autocast_enabled(x.device.type)
    ys = adapted_linears(x if autocast else x.to(dtype), members, dropout_p=dropout_p)
    return [y.to(x.dtype) for y in ys]


def weight_of(base: Any) -> Tensor | NF4Weight:
    """W [N, K] as the operation takes it; of a Conv1D a view of its [K, N]."""
    weight = base.weight
    if type(base) is nn.Linear:
        return weight
    if is_conv1d(base):
        return weight.T
    packed = isinstance(base, four_bit.classes or four_bit.find())
    return NF4Weight.view(weight.data, weight.quant_state) if packed else weight


def is_conv1d(base: Any) -> bool:
    """Whether `base` is the linear layer of GPT-2, ``transformers.pytorch_utils.Conv1D``."""
    kind = type(base)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def describe(base: nn.Module) -> str:
    """The weight's storage in one word, for the report: bfloat16, nf4, …"""
    if is_four_bit(base):
        return str(getattr(base.weight, "quant_type", "4bit"))
    if packed_parameters(base):
        return "nf4"
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor):  # experts, whose weights have names of their own
        weight = next(base.parameters(recurse=False), None)
    return "unknown" if weight is None else str(weight.dtype).removeprefix("torch.")


def weight_shape(base: Any) -> tuple[int, ...]:
    """(N, K) of the base's weight, packed or not."""
    if is_conv1d(base):
        return tuple(reversed(base.weight.shape))
    if type(base) is nn.Linear or not isinstance(base, four_bit.classes or four_bit.find()):
        return tuple(base.weight.shape)
    if getattr(base.weight, "quant_state", None) is None:
        restore_quant_state(base)
    return tuple(base.weight.quant_state.shape)


def four_bit_dtype(base: Any, x: Tensor) -> torch.dtype:
    """The dtype to which Linear4bit.forward casts x; settled by the first input, as there."""
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    return base.compute_dtype or x.dtype
