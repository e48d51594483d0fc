"""Merging PEFT's LoRA adapters into their base layer in one pass over W, and unmerging them.

    W' = round(W + Σᵢ sᵢ Bᵢ Aᵢ)          W'' = round(W' − Σᵢ sᵢ Bᵢ Aᵢ)         (i: merged adapters)

Sums and products are float32 and rounded once, while PEFT computes each Δᵢ in the dtype of W and
rounds after each. A dense W is updated in place, and unmerging restores W to within one ulp of the
larger of W and W'. An NF4 W is quantised again; the original is kept, so unmerging is exact.
Anything but plain LoRA (DoRA and other variants, a bias of lora_B, ``fan_in_fan_out``, hooks,
sharded weights) falls back to PEFT, and so does safe_merge, which merges into a copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..base_layer.merging import KeptWeight, LowRank, add_low_rank, merge
from ..base_layer.obstacles import base_obstacle, module_obstacle, tensor_obstacle
from ..four_bit import is_four_bit

_KEPT = "_lora_fast_kept_weight"


def plain_terms(layer: Any, names: Iterable[str]) -> list[LowRank] | None:
    """s B A of each adapter; None if one of them, or the layer, is not plain LoRA."""
    if base_obstacle(layer.base_layer) is not None or getattr(layer, "fan_in_fan_out", False):
        return None
    terms, device = [], layer.base_layer.weight.device
    for name in names:
        if name not in layer.lora_A:
            continue
        A, B = layer.lora_A[name], layer.lora_B[name]
        unusual = (
            name in layer.lora_variant
            or module_obstacle(A, "lora_A", nn.Linear)
            or module_obstacle(B, "lora_B", nn.Linear)
            or tensor_obstacle(A.weight, "lora_A")
            or tensor_obstacle(B.weight, "lora_B")
            or A.bias is not None
            or B.bias is not None
        )
        if unusual or A.weight.device != device or B.weight.device != device:
            return None
        terms.append(LowRank(A.weight.detach(), B.weight.detach(), layer.scaling[name]))
    return terms


@torch.no_grad()
def merge_terms(layer: Any, terms: list[LowRank]) -> None:
    """W ← W'."""
    base = layer.base_layer
    if is_four_bit(base):
        layer.__dict__.setdefault(_KEPT, merge(base, terms))
    else:
        add_low_rank(base.weight.detach(), terms)


@torch.no_grad()
def unmerge_terms(layer: Any, terms: list[LowRank]) -> None:
    """W ← W'', or the original NF4 weight."""
    base = layer.base_layer
    kept: KeptWeight | None = layer.__dict__.pop(_KEPT, None)
    if kept is not None:
        kept.restore(base)
    elif is_four_bit(base):
        merge(base, [LowRank(t.A, t.B, -1.0 * t.scaling) for t in terms])
    else:
        add_low_rank(base.weight.detach(), terms, sign=-1.0)
