"""Where a module of experts keeps its 4-bit parameters: as bitsandbytes' parametrizations do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def packed_experts(module: nn.Module, name: str) -> tuple[Tensor, Any] | None:
    """The packed bytes and the ``quant_state`` of a 4-bit parameter; None for any other, and while
    something else is added to it."""
    lists: Any = module._modules.get("parametrizations")
    if lists is None or name not in lists or len(lists[name]) != 1:
        return None
    state = getattr(lists[name][0], "quant_state", None)
    return None if state is None else (lists[name].original, state)
