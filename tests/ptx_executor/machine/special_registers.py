"""Special registers: %tid, %ctaid, %laneid and so on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..numbers.integers import U32, U64

_ZERO = ("cluster_ctaid", "cluster_ctarank", "smid", "gridid", "is_explicit_cluster")
_ONE = ("cluster_nctaid", "cluster_nctarank")


def value_of(state: Any, name: str) -> np.ndarray:
    """The register's value in every thread of a batch. NotImplementedError for clocks."""
    base, _, axis_name = name[1:].partition(".")
    axis = "xyz".index(axis_name) if axis_name else 0
    numbers = {
        "ntid": state.threads if axis == 0 else 1,
        "nctaid": state.grid[axis],
        "nclusterid": state.grid[axis],
        "nwarpid": state.warps,
        "dynamic_smem_size": state.shared.size,
        "total_smem_size": state.shared.size,
        **dict.fromkeys(_ZERO, 0),
        **dict.fromkeys(_ONE, 1),
    }
    lane = state.lane_thread % 32
    if base in numbers:
        return np.full(state.lanes, numbers[base], U32)
    if base == "tid":
        return (state.lane_thread if axis == 0 else np.zeros(state.lanes)).astype(U32)
    if base in ("ctaid", "clusterid"):
        return np.repeat(np.array([cta[axis] for cta in state.ctas], U32), state.threads)
    if base == "laneid":
        return lane.astype(U32)
    if base == "warpid":
        return state.lane_warp.astype(U32)
    if base.startswith("lanemask"):
        one = np.uint64(1)
        bit = one << lane.astype(U64)
        masks = {"eq": bit, "lt": bit - one, "le": (bit << one) - one}
        masks["ge"], masks["gt"] = ~masks["lt"], ~masks["le"]
        return (masks[base[-2:]] & np.uint64(0xFFFFFFFF)).astype(U32)
    raise NotImplementedError(f"special register {name}")
