"""NF4 weights that a recomputed forward pass decodes once, for its backward pass, too.

A decoded W is one of the tensors saved for backward. Without reentrant checkpointing the node that
runs backward is that of the first forward pass, and the recomputed one only fills in what it saved;
so wherever the recomputed one may save W, the first saves a placeholder of its shape, one element
of memory, which checkpointing drops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..experts.nf4_experts import NF4Experts
from ..factors import Factors
from ..four_bit.decoded import Decoded
from ..nf4 import NF4Weight

_PACKED = (NF4Weight, NF4Experts)


def is_checkpointed_or_recomputed() -> bool:
    """Whether a node that is made now may save decoded weights: a backward pass is running, or
    checkpointing takes what is saved. Other hooks, which may copy it elsewhere, get none."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None:
        return bool(hooks[0].__module__ == "torch.utils.checkpoint")
    return bool(torch._C._current_graph_task_id() != -1)


def remembering(fs: Sequence[Any]) -> Sequence[Any]:
    """The factors of layers or experts with NF4 weights that remember W, if this forward pass runs
    in a backward pass."""
    if torch._C._current_graph_task_id() == -1:
        return fs
    return [_with(f, Decoded()) for f in fs]


def saved_weights(fs: Sequence[Any], x: Tensor) -> list[Tensor]:
    """Of every NF4 weight what is saved: W [N, K] or [E, N, K], or a placeholder of its shape."""
    return [_saved(f.weight, x) for f in fs if isinstance(f.weight, _PACKED)]


def _saved(weight: NF4Weight | NF4Experts, x: Tensor) -> Tensor:
    W = None if weight.decoded is None else weight.decoded.dense
    if W is None or W.dtype != x.dtype:
        return x.new_empty_strided(weight.shape, (0,) * len(weight.shape))
    return W


def with_saved(fs: Sequence[Any], saved: Sequence[Tensor]) -> list[Any]:
    """The factors with the weights W that were saved; of experts W in place of theirs."""
    remaining, found = iter(saved), []
    for f in fs:
        if isinstance(f.weight, _PACKED):
            W = next(remaining)
            if any(W.stride()):
                is_layer = isinstance(f.weight, NF4Weight)
                f = _with(f, Decoded(W)) if is_layer else f._replace(weight=W)
        found.append(f)
    return found


def _with(f: Any, decoded: Decoded) -> Any:
    weight = f.weight
    if isinstance(weight, NF4Weight):
        return Factors(NF4Weight(weight.packed, weight.quant_state, decoded), *f[1:])
    if isinstance(weight, NF4Experts):
        return f._replace(weight=replace(weight, decoded=decoded))
    return f
