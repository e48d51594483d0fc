"""Merging adapters into 4-bit experts, and unmerging them exactly.

    W'_e = NF4(W_e + Σᵢ sᵢ Bᵢ_e Aᵢ_e)          (i: merged adapters)

Decoded, added in float32 and quantised again, an expert at a time but for the quantisation, with
the block size and nesting of the original, which is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..experts.nf4_experts import NF4Experts
from ..experts.quantisation import packed_like
from ..experts.storage import packed_experts, store_packed

_KEPT = "_lora_fast_kept_experts"


@torch.no_grad()
def merge_packed(wrapper: Any, names: list[str]) -> None:
    """Add the adapters `names` to the 4-bit parameter of a wrapper.

    Raises ValueError, with the parameter unchanged, if the sum is not finite.
    """
    module = wrapper.get_base_layer()
    packed, state = _packed(wrapper)
    total = NF4Experts(packed, state).dequantize(torch.float32)
    for name in names:
        lhs, rhs, scaling = factors_of(wrapper, name)
        for expert, (left, right) in enumerate(zip(lhs, rhs, strict=True)):
            total[expert].addmm_(left.float(), right.float(), alpha=float(scaling))
    merged = total.to(state.dtype)
    if not torch.isfinite(merged).all():
        raise ValueError(
            f"lora_A and lora_B must give finite weights, got NaN or infinity for {names}"
        )
    wrapper.__dict__.setdefault(_KEPT, (packed, state))
    store_packed(
        module, wrapper.parameter_name, *packed_like(merged, int(state.blocksize), state.nested)
    )


def unmerge_packed(wrapper: Any) -> None:
    """Restore the parameter that was kept."""
    packed, state = wrapper.__dict__.pop(_KEPT)
    device = _packed(wrapper)[0].device
    store_packed(wrapper.get_base_layer(), wrapper.parameter_name, packed.to(device), state)


def is_packed(wrapper: Any) -> bool:
    """Whether the parameter of a wrapper is stored in 4 bits."""
    return packed_experts(wrapper.get_base_layer(), wrapper.parameter_name) is not None


def factors_of(wrapper: Any, name: str) -> tuple[Tensor, Tensor, Any]:
    """(lhs, rhs, s) with s · lhs_e rhs_e as the parameter is stored, [E, P, Q]."""
    A, B, E = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.num_experts
    of_A = A.reshape(E, -1, A.shape[1])
    of_B = B.reshape(B.shape[0], -1, E).permute(2, 0, 1)
    if wrapper._did_swap_in_out_features:
        return of_B, of_A, wrapper.scaling[name]
    return of_A.transpose(1, 2), of_B.transpose(1, 2), wrapper.scaling[name]


def _packed(wrapper: Any) -> tuple[Tensor, Any]:
    found = packed_experts(wrapper.get_base_layer(), wrapper.parameter_name)
    assert found is not None
    return found
