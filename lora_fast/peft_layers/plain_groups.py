"""The short way of a group of LoRA layers that read the same x (shared_input.py), all plain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base_layer.obstacles import environment_obstacle
from ..operation.autograd import run
from .compiled_siblings import GROUP
from .plain_lora import (
    Plain,
    autocast_dtype,
    fingerprint_of,
    fits,
    input_of,
    output_of,
    plain_output,
    read_plain,
)
from .shared_input import Kept, kept_output, runs_hooks


def plain_output_in_group(layer: Any, x: Any) -> Tensor | None:
    """The output of a plain layer (plain_lora.py) of a group: what a sibling has computed, or
    computed now, with those of its siblings or alone; None if it takes the long way."""
    if torch.compiler.is_compiling() or environment_obstacle() is not None:
        return None
    group, index = layer._lora_fast_group
    kept: Kept | None = group.of_thread.kept
    if kept is not None and kept.first < index and kept.x() is x:
        kept_y = kept_output(layer, x)  # type: ignore[arg-type]
        return plain_output(layer, x) if kept_y is None else kept_y
    if index + 1 == len(group.names):
        return plain_output(layer, x)
    plain = read_plain(layer)
    if plain is None or not isinstance(x, Tensor) or x.is_inference():
        return None
    casts = autocast_dtype(x)
    if not (_may_share(plain) and fits(layer, plain, x, casts)) or runs_hooks(layer):
        return None
    parent = group.parent_of(index, layer)
    if parent is None or not group.is_called_as_read(parent):
        return None
    plains, before = [plain], {}
    for i in range(index + 1, len(group.names)):
        sibling: Any = parent._modules.get(group.names[i])
        if sibling is None or sibling.__dict__.get(GROUP) != (group, i):
            continue
        changed = "forward" in sibling.__dict__ or runs_hooks(sibling)
        found = None if changed else read_plain(sibling)
        if found is None or not _are_alike(found, plain) or not fits(sibling, found, x, casts):
            return None  # the long way knows what that means for the others
        plains.append(found)
        before[i] = fingerprint_of(found)
    if not before or None in before.values():
        return None
    y, *others = run(input_of(plain, x, casts), [each.factors() for each in plains])
    if plain.quant_state is not None:
        y, *others = (output_of(x, each, casts) for each in (y, *others))
    outputs = dict(zip(before, zip(others, before.values(), strict=True), strict=True))
    group.of_thread.kept = kept = Kept(x, index, outputs)
    return kept.live_with(y)


def _may_share(plain: Plain) -> bool:
    return plain.quant_state is not None or not plain.weight.requires_grad


def _are_alike(one: Plain, other: Plain) -> bool:
    """Whether two layers compute in one dtype, on weights of one kind, with one dropout."""
    return (
        one.dtype is other.dtype
        and one.constants.dropout_p == other.constants.dropout_p
        and (one.quant_state is None) is (other.quant_state is None)
        and one.weight.dtype is other.weight.dtype
        and _may_share(one)
    )
