"""The short way of a group of LoRA layers that read the same x (shared_input.py), all plain."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from ..backends.choice import is_one_row_on_a_cpu
from ..base_layer.obstacles import is_eager
from ..operation.autograd import run
from .compiled_siblings import GROUP
from .plain_lora import (
    CASTS_INPUT,
    TENSORS,
    Plain,
    autocast_dtype,
    fingerprint_of,
    geometry_if_fitting,
    input_of,
    is_frozen,
    output_of,
    plain_output,
    read_plain,
)
from .shared_input import Kept, kept_output, runs_hooks


def plain_output_in_group(layer: Any, x: Any) -> Tensor | None:
    """The output of a plain layer (plain_lora.py) of a group: what a sibling has computed, or
    computed now, with those of its siblings or alone; None if it takes the long way."""
    if not is_eager():
        return None
    group, index = layer._lora_fast_group
    kept: Kept | None = group.of_thread.kept
    if kept is not None and kept.first < index and kept.x() is x:
        kept_y = kept_output(layer, x, sys._getframe(1))  # type: ignore[arg-type]
        return plain_output(layer, x) if kept_y is None else kept_y
    if index + 1 == len(group.names) or is_one_row_on_a_cpu(x):
        return plain_output(layer, x)
    plain = read_plain(layer)
    if plain is None or type(x) not in TENSORS or x.is_inference() or runs_hooks(layer):
        return None
    if not is_frozen(plain):
        return None
    parent = group.parent_of(index, layer, sys._getframe(1))
    if parent is None or not group.is_called_as_read(parent):
        return None
    fs, before = [plain.factors], {}
    for i in range(index + 1, len(group.names)):
        sibling: Any = parent._modules.get(group.names[i])
        if sibling is None or sibling.__dict__.get(GROUP) != (group, i):
            continue
        changed = "forward" in sibling.__dict__ or runs_hooks(sibling)
        found = None if changed else read_plain(sibling)
        if found is None or not _are_alike(sibling, found, layer, plain):
            return None  # the long way knows what that means for the others
        fs.append(found.factors)
        before[i] = fingerprint_of(found)
    if not before or None in before.values():
        return None
    casts = autocast_dtype(x)
    fitting = geometry_if_fitting(layer, x, fs, plain.dtype, casts)
    if fitting is None:
        return None
    read = input_of(plain, x, casts)
    y, *others = run(read, fs, None, fitting if read is x else None)
    if plain.dtype is not None:
        y, *others = (output_of(x, each, casts) for each in (y, *others))
    outputs = {i: (other, before[i]) for i, other in zip(before, others, strict=True)}
    group.of_thread.kept = kept = Kept(x, index, outputs)
    return kept.live_with(y)


def _are_alike(layer: Any, plain: Plain, first: Any, of_first: Plain) -> bool:
    """Whether two layers compute in one dtype, on weights of one kind, with one dropout."""
    f, f_first = plain.factors, of_first.factors
    return (
        plain.dtype is of_first.dtype
        and f[7][1] == f_first[7][1]
        and f[0].dtype is f_first[0].dtype
        and is_frozen(plain)
        and layer.__dict__.get(CASTS_INPUT, True) is first.__dict__.get(CASTS_INPUT, True)
    )
