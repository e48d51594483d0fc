"""What a model and its adapters would do without a word: before a run, while it costs nothing.

Each finding is one line that says what happens, where, and what to do about it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..experts.quantisation import expert_modules, expert_parameters
from ..experts.routers import is_router
from ..magnitudes import first_of, short_count, short_size
from ..modules.weight_reads import multiplies_by_itself
from .expert_summary import about_layers_beside_experts
from .report import adapted_layers, report
from .routes import OPAQUE

# Part of a class's name, and the packages without which it runs step by step in PyTorch.
_LINEAR_ATTENTION = (
    (re.compile(r"Delta(Net|Attention)"), ("fla", "causal_conv1d")),
    (re.compile(r"Mamba\w*Mixer|Mamba2?Block"), ("mamba_ssm", "causal_conv1d")),
)
# Beginnings of reasons for a fallback, and what would fuse the layer.
_REMEDIES = (
    ("adapters disabled", "enable_adapters()"),
    ("merged", "unmerge_adapter()"),
    ("not accelerated", "accelerate(model)"),
    ("hooks on", "remove the hooks while training"),
    ("forward of", "call accelerate after what replaces the forward"),
    ("base layer", "load the base in 4 or 16 bits"),
    ("variant", "train plain LoRA, rsLoRA or DoRA"),
    ("DoRA with several", "train one adapter at a time"),
    ("dropout with several", "lora_dropout=0"),
    ("global module hooks", "remove them"),
)


def pitfalls(
    model: nn.Module,
    *,
    autocast: torch.dtype | None = None,
    fused_loss: bool | None = None,
    packs_experts: bool = False,
) -> tuple[str, ...]:
    """A line for each thing that `model` with its adapters would do silently.

    Experts neither adapted nor quantised · an adapter around the output layer, or the embedding
    whose weight it has, which a fused loss multiplies with as it is · float32 adapters under
    `autocast` · linear attention without its package · dropout that other libraries leave out ·
    ``target_modules`` that match nothing, or a router · layers whose names PEFT takes for those of
    experts · an adapter on a layer that the model does not call · layers that fall back to PEFT,
    and what would fuse them. `fused_loss`: whether the loss is one; None: not known.
    `packs_experts`: whether experts that are dense here will be in 4 bits.
    """
    finders = (
        () if packs_experts else _experts(model),
        _output_layer(model, fused_loss),
        _wide_adapters(model, autocast),
        _linear_attention(model),
        _dropout(model),
        _targets(model),
        _routers(model),
        _beside_experts(model),
        _bypassed(model),
        _fallbacks(model),
    )
    return tuple(line for found in finders for line in found)


def _experts(model: nn.Module) -> Iterator[str]:
    wrapped = [m for m in model.modules() if type(m).__name__.endswith("ParamWrapper")]
    adapted = {id(m) for wrapper in wrapped for m in wrapper.modules()}
    bare = [
        module
        for _, module in expert_modules(model)
        if expert_parameters(module) and id(module) not in adapted
    ]
    count = sum(
        module.get_parameter(n).numel() for module in bare for n in expert_parameters(module)
    )
    if bare:
        yield (
            f"experts: {short_count(count)} parameters in {len(bare)} modules are neither adapted "
            "(target_parameters) nor quantised (lora_fast.quantize_experts)"
        )


def _output_layer(model: Any, fused_loss: bool | None) -> Iterator[str]:
    if fused_loss is False:
        return
    adapters = {id(layer): name for name, layer in adapted_layers(model)}
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    for role in ("get_output_embeddings", "get_input_embeddings"):
        layer = _asked(base, role)
        tied = getattr(getattr(base, "config", None), "tie_word_embeddings", False)
        if id(layer) in adapters and (role == "get_output_embeddings" or tied):
            when = "the fused loss" if fused_loss else "a fused loss (Liger, Cut Cross-Entropy)"
            yield (
                f"{first_of([adapters[id(layer)]])}: {when} multiplies with its weight alone, so "
                "that the adapter has no effect and no gradient; leave it out of target_modules"
            )


def _asked(base: Any, role: str) -> Any:
    """What a method of the model without arguments returns; None if it has none that answers."""
    try:
        return getattr(base, role)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _wide_adapters(model: nn.Module, autocast: torch.dtype | None) -> Iterator[str]:
    if autocast not in (torch.bfloat16, torch.float16):
        return
    count = sum(
        p.numel()
        for _, layer in adapted_layers(model)
        for name in getattr(layer, "adapter_layer_names", ())
        for p in getattr(layer, name).parameters()
        if p.requires_grad and p.dtype is torch.float32
    )
    if count:
        word = str(autocast).removeprefix("torch.")
        yield (
            f"adapters: {short_count(count)} parameters in float32 under {word} autocast: "
            f"{short_size(4 * count)}, as much for their gradients, and {short_size(2 * count)} of "
            "copies in every pass; autocast_adapter_dtype=False keeps them in the base's dtype"
        )


def _linear_attention(model: nn.Module) -> Iterator[str]:
    kinds = Counter(type(module).__name__ for module in model.modules())
    for pattern, packages in _LINEAR_ATTENTION:
        names = sorted(name for name in kinds if pattern.search(name))
        absent = [p for p in packages if find_spec(p) is None]
        if names and absent:
            yield (
                f"{', '.join(names)}: without {' and '.join(absent)} the recurrence runs step by "
                "step in PyTorch, which takes longer than all linear layers"
            )


def _dropout(model: nn.Module) -> Iterator[str]:
    rates = {
        float(dropout.p)
        for _, layer in adapted_layers(model)
        for dropout in getattr(layer, "lora_dropout", {}).values()
        if isinstance(dropout, nn.Dropout) and dropout.p > 0
    }
    if rates:
        p = ", ".join(f"{rate:g}" for rate in sorted(rates))
        yield (
            f"lora_dropout = {p} is applied here; libraries whose kernels have none leave it out "
            "or run PEFT's code, so losses beside theirs differ"
        )


def _targets(model: Any) -> Iterator[str]:
    names = [name for name, _ in adapted_layers(model)]
    for adapter, config in (getattr(model, "peft_config", None) or {}).items():
        targets = getattr(config, "target_modules", None)
        if not isinstance(targets, list | set | tuple):
            continue
        lost = [t for t in sorted(targets) if not any(_is_target(name, t) for name in names)]
        if lost:
            yield f"target_modules of {adapter}: {', '.join(lost)} match no layer of the model"


def _is_target(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _routers(model: nn.Module) -> Iterator[str]:
    modules = dict(model.named_modules())
    found = [name for name, _ in adapted_layers(model) if is_router(name, modules)]
    if found:
        yield (
            f"{first_of(found)}: an adapter on a router changes which experts are chosen or how "
            'much they count, and what was balanced; PEFT\'s target_modules="all-linear" puts one '
            f"there: to leave it out, write {_targets_without(model, found)}"
        )


def _beside_experts(model: nn.Module) -> Iterator[str]:
    line = about_layers_beside_experts(model)
    if line is not None:
        yield line


def _bypassed(model: nn.Module) -> Iterator[str]:
    modules = dict(model.named_modules())
    by_parent: dict[str, list[str]] = {}
    for name, _ in adapted_layers(model):
        parent, _, child = name.rpartition(".")
        if multiplies_by_itself(modules[parent], child):
            by_parent.setdefault(type(modules[parent]).__name__, []).append(name)
    for kind, names in by_parent.items():
        yield (
            f"{first_of(names)}: {kind} uses its weight instead of calling it, in all of its code "
            "or a part, where the adapter has no effect; leave it out of target_modules"
        )


def _targets_without(model: nn.Module, left_out: list[str]) -> str:
    """Arguments of PEFT's config that adapt all that is adapted, by name, but `left_out`."""
    modules, parameters = set(), set()
    for name, layer in adapted_layers(model):
        last = name.replace(".base_layer", "").rpartition(".")[2]
        if name in left_out:
            continue
        if hasattr(layer, "parameter_name"):
            parameters.add(f"{last}.{layer.parameter_name}")
        else:
            modules.add(last)
    found = {"target_modules": sorted(modules), "target_parameters": sorted(parameters)}
    return ", ".join(f"{name}={targets}" for name, targets in found.items() if targets) or (
        "the names of other layers"
    )


def _fallbacks(model: nn.Module) -> Iterator[str]:
    by_reason: dict[str, list[str]] = {}
    for line in report(model).layers:
        if line.obstacle is not None and not line.route.startswith(OPAQUE):
            by_reason.setdefault(line.obstacle, []).append(line.name)
    for reason, names in by_reason.items():
        remedy = next((what for start, what in _REMEDIES if reason.startswith(start)), None)
        if remedy is not None or "no fused path" not in reason:
            advice = f"; to fuse: {remedy}" if remedy else ""
            yield f"{first_of(names)}: PEFT's own forward runs, {reason}{advice}"
