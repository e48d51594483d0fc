"""The plan: every part of the memory of a run, and the changes that would reduce it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import TrainingError
from ..experts.quantisation import expert_modules
from ..methods.base_model import Base
from ..methods.options import MethodOptions
from ..methods.table import METHODS, completed
from ..optional_packages import needed
from .activations import Activations, count_activations
from .advice import changes
from .experts import Experts, about_experts, experts_of
from .memory_plan import MemoryPlan
from .settings import FULL, SHAPING, Settings
from .states import decode_bytes, nf4_layers, optimizer_bytes, weight_bytes


@dataclass(frozen=True)
class _Counted:
    """What a model and its adapter come to, whatever the batch and the optimizer."""

    name: str
    model: nn.Module
    weights: Mapping[str, int]
    adapters: int
    trained: tuple[torch.Tensor, ...]
    extra_state: int
    master: int
    decode: int
    parameters: int
    experts: Experts | None = None


def plan(
    model_or_config: Any,
    *,
    method: str | None = None,
    quantize: str | None = None,
    r: int | None = None,
    dropout: float | None = None,
    target_modules: str | None = None,
    frequencies: int | None = None,
    virtual_tokens: int | None = None,
    experts: bool | None = None,
    dtype: str = "bfloat16",
    task: str | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    gradient_checkpointing: bool = False,
    optim: str = "adamw_torch",
    fused: bool = True,
    advise: bool = True,
    told: Callable[[str], None] = lambda stage: None,
) -> MemoryPlan:
    """Count the bytes that training will need, before anything is loaded.

    `model_or_config`: a folder, a ``config.json``, a hub id or a transformers config; or a model,
    which is taken as it is, adapters and all. A checkpoint in bitsandbytes' 4 bits is nf4; of one
    in another quantised format a copy without it is planned, with a note.

    How a config becomes a model that trains, which must not be given with a model:

    `method`: one of ``lora-fast train --method``, lora by default, or full.
    `quantize`: nf4 or none; by default nf4, and none for full.
    `r`, `dropout`, `target_modules`, `frequencies`, `virtual_tokens`: the method's, and its own
    defaults.
    `experts`: adapters on the experts of a mixture, too; by default none.

    How it trains:

    `dtype`: bfloat16, float16 or float32, of activations and dense weights.
    `task`: causal-lm or classification; by default what the config names.
    `batch_size`, `max_length`: examples and tokens of a step; by default 8 × 1024, for
    classification 32 × 256.
    `gradient_checkpointing`: whether blocks are recomputed in the backward pass.
    `optim`: adamw_torch, adamw_torch_fused, adamw_8bit, paged_adamw_32bit, paged_adamw_8bit or sgd.
    `fused`: whether the model is accelerated; otherwise stock PEFT.
    `advise`: whether to look for changes that would save memory, which takes most of the time.
    `told`: called with the name of each stage before it starts.

    Nothing is allocated: parameters are counted on the meta device, activations by a forward pass
    on fake tensors.

    Raises ValueError or TypeError that names the argument: an option out of range, a config that
    cannot be found or read, a method that does not fit the model. Raises ImportError for a config
    without transformers and PEFT, and without bitsandbytes unless ``quantize="none"``.
    """
    given = Settings(
        method=method or "lora", quantize=quantize, r=r, dropout=dropout,
        target_modules=target_modules, frequencies=frequencies, virtual_tokens=virtual_tokens,
        experts=experts,
        dtype=dtype, task=task, batch_size=batch_size, max_length=max_length,
        gradient_checkpointing=gradient_checkpointing, optim=optim, fused=fused,
    )  # fmt: skip
    if isinstance(model_or_config, nn.Module):
        wrong = [name for name in SHAPING[1:] if getattr(given, name) is not None]
        if method is not None or wrong:
            named = "method" if method is not None else wrong[0]
            raise ValueError(f"{named} must not be given with a model, which is taken as it is")
        given = given.complete(given.task or "causal-lm")
        counted = _count_model(model_or_config, given)
        return _planned(counted, given, *_trace(counted, given))
    told("Reading the config")
    name, config = _config(model_or_config)
    given, notes_on_config = settled(config, given)
    told("Counting parameters")
    counted = _count(name, config, given)
    told("Counting activations")
    traced, notes = _trace(counted, given)
    without = about_left_out(counted.model, given)
    found = _planned(counted, given, traced, (*notes_on_config, *without, *notes))
    if not advise:
        return found

    def replanned(what: str, other: Settings) -> MemoryPlan:
        told(f"Trying {what}")
        return _replanned(config, counted, found, traced, other)

    return replace(found, changes=changes(found, counted.model, replanned))


def _config(source: Any) -> tuple[str, Any]:
    from ..skeleton import load_config

    if isinstance(source, str | Path):
        return str(source), load_config(source)
    if not hasattr(source, "model_type"):
        raise TypeError(
            "model_or_config must be a model, a transformers config, a folder, a config.json or a "
            f"hub id, got {type(source).__name__}"
        )
    return source.model_type, source


def settled(config: Any, given: Settings) -> tuple[Settings, tuple[str, ...]]:
    """The settings for a config, nothing of them left open, and what to say of that."""
    from ..skeleton import default_task

    stored: Any = getattr(config, "quantization_config", None)
    notes: list[str] = []
    if stored is not None:
        options = stored if isinstance(stored, dict) else stored.to_dict()
        if options.get("load_in_4bit"):
            given = replace(given, quantize="nf4")
        else:
            kind = options.get("quant_method", "an unknown format")
            notes.append(
                f"the checkpoint is stored in {kind}; this is for a copy in {given.dtype}, whose "
                "config.json has no quantization_config"
            )
    open_length = given.max_length is None
    given = given.complete(given.task or default_task(config))
    given, more = _within_positions(config, given, not open_length)
    return given, (*notes, *more)


def _within_positions(config: Any, settings: Settings, given: bool) -> tuple[Settings, list[str]]:
    """The settings, with no more tokens than the model has positions for, unless they were given;
    and a note where they were."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1 or (settings.max_length or 0) <= limit:
        return settings, []
    if not given:
        return replace(settings, max_length=limit), []
    return settings, [f"the model has {limit} positions: lora-fast train takes no longer examples"]


def _count(name: str, config: Any, settings: Settings) -> _Counted:
    from ..skeleton import skeleton

    dtype = getattr(torch, settings.dtype)
    base = skeleton(config, settings.task, dtype)
    base.config.use_cache = settings.method == "prefix"
    quantised = nf4_layers(base) if settings.quantize == "nf4" else {}
    own = {id(tensor) for tensor in [*base.parameters(), *base.buffers()]}
    with_experts = [module for _, module in expert_modules(base)]
    model = adapted(name, base, settings)
    tensors = [*model.parameters(), *model.buffers()]
    trained = tuple(p for p in model.parameters() if p.requires_grad)
    added = [t for t in tensors if id(t) not in own]
    experts = experts_of(with_experts, model, quantised=settings.quantize == "nf4")
    apart = experts.weights if experts else ()
    frozen = (t for t in tensors if id(t) in own and id(t) not in apart)
    return _Counted(
        name=name,
        model=model,
        weights=weight_bytes(frozen, quantised),
        adapters=sum(weight_bytes(added, {}).values()),
        trained=trained,
        extra_state=_extra_state(model, settings, quantised),
        master=sum(4 * p.numel() for p in trained if settings.method == FULL and p.itemsize < 4),
        decode=max(decode_bytes(model, quantised, dtype), _experts_decoded(experts, dtype)),
        parameters=sum(p.numel() for p in model.parameters()),
        experts=experts,
    )


def _count_model(model: Any, settings: Settings) -> _Counted:
    trained = tuple(p for p in model.parameters() if p.requires_grad)
    experts = experts_of((m for _, m in expert_modules(model)), model, quantised=False)
    apart = experts.weights if experts else ()
    frozen = [p for p in model.parameters() if not p.requires_grad and id(p) not in apart]
    dtype = getattr(torch, settings.dtype)
    return _Counted(
        name=type(model).__name__,
        model=model,
        weights=weight_bytes([*frozen, *model.buffers()], {}),
        adapters=sum(weight_bytes(trained, {}).values()),
        trained=trained,
        extra_state=0,
        master=0,
        decode=max(decode_bytes(model, {}, dtype), _experts_decoded(experts, dtype)),
        parameters=(experts.elements if experts else 0)
        + sum(
            p.quant_state.shape.numel() if getattr(p, "quant_state", None) else p.numel()
            for p in model.parameters()
            if id(p) not in apart
        ),
        experts=experts,
    )


def _experts_decoded(experts: Experts | None, dtype: torch.dtype) -> int:
    """The workspace into which the largest projection of all experts is decoded."""
    return experts.decoded * dtype.itemsize if experts else 0


def adapted(name: str, base: Any, settings: Settings) -> Any:
    """The model that trains, from a skeleton of the base model.

    Raises ValueError if the method does not fit it.
    """
    if settings.method == FULL:
        return base
    needed("peft", f"method {settings.method}")

    dtype = getattr(torch, settings.dtype)
    try:
        given = {key: getattr(settings, key) for key in SHAPING} | {"quantize": "none"}
        given["experts"] = bool(settings.experts)
        if settings.task is not None:
            given["task"] = settings.task
        options = completed(MethodOptions(**given), sum(p.numel() for p in base.parameters()))
        held = Base(name, base, _NoTokenizer(), dtype, torch.device("meta"))
        with torch.device("meta"):  # PEFT makes factors before it moves them
            return METHODS[settings.method].build(held, options, 100)
    except TrainingError as error:
        raise ValueError(f"method {settings.method}: {error}") from error


def about_left_out(model: nn.Module, settings: Settings) -> tuple[str, ...]:
    """What to say of linear layers that a method for all of them leaves alone."""
    from ..methods.targets import about_left_out as about

    return tuple(about(model)) if settings.adapts_all_linear else ()


class _NoTokenizer:
    """Where a method sets the side of the padding."""

    padding_side = "right"


def _extra_state(model: Any, settings: Settings, quantised: Mapping[int, nn.Module]) -> int:
    """What a method keeps beside the optimizer: AdaLoRA's averages, Delta-LoRA's first weights."""
    if settings.method == "adalora":
        return 3 * sum(p.numel() * 4 for n, p in model.named_parameters() if "lora_" in n)
    if settings.method != "delta-lora":
        return 0
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    factors = [p for layer in layers for n, p in layer.named_parameters() if "lora_" in n]
    weights = [layer.base_layer.weight for layer in layers]
    kept = [w for w in weights if id(w) in quantised or w.itemsize < 4]
    starts = sum(weight_bytes(kept, dict(quantised)).values())
    return starts + sum(4 * p.numel() for p in factors)


def _trace(counted: _Counted, s: Settings) -> tuple[Activations | None, tuple[str, ...]]:
    try:
        return count_activations(
            counted.model,
            task=s.task,
            batch_size=s.batch_size or 1,
            max_length=s.max_length or 1,
            dtype=getattr(torch, s.dtype),
            fused=s.fused,
        ), ()
    except NotImplementedError as error:
        return None, (f"activations, logits and workspace are not in the total: {error}",)


def _planned(
    counted: _Counted, s: Settings, traced: Activations | None, notes: tuple[str, ...] = ()
) -> MemoryPlan:
    state, paged = optimizer_bytes(counted.trained, s.optim)
    if counted.master and s.optim != "sgd":
        # Mixed precision: the moments are float32 as the master copy is.
        wide = [torch.empty(p.shape, device="meta") for p in counted.trained]
        state, paged = optimizer_bytes(wide, s.optim)
    parts = {f"weights, {kind}": size for kind, size in counted.weights.items()}
    if counted.experts is not None:
        for kind, size in counted.experts.sizes.items():
            parts[f"weights of experts, {kind}"] = size
        notes = (about_experts(counted.experts), *notes)
    parts["adapters"] = counted.adapters
    parts["gradients"] = sum(p.numel() * p.itemsize for p in counted.trained)
    if counted.master:
        parts["master weights, float32"] = counted.master
    parts["optimizer state"] = state + counted.extra_state
    kept = None
    if traced is not None:
        kept = {
            "without": traced.kept(checkpointing=False),
            "with_checkpointing": traced.kept(checkpointing=True),
        }
        parts["activations"] = traced.kept(checkpointing=s.gradient_checkpointing)
        parts["logits"] = traced.logits
        parts["workspace"] = counted.decode + 2 * traced.widest
    else:
        parts["workspace"] = counted.decode
    trainable = sum(p.numel() for p in counted.trained)
    return MemoryPlan(
        counted.name, s, counted.parameters, trainable, parts, kept, paged=paged, notes=notes
    )


def _replanned(
    config: Any, counted: _Counted, now: MemoryPlan, traced: Activations | None, s: Settings
) -> MemoryPlan:
    """The plan for other settings; what a change leaves alone is not counted again."""
    before = now.settings
    shaping = [name for name in SHAPING if getattr(s, name) != getattr(before, name)]
    if shaping:
        counted = _count(counted.name, config, s)
    if "method" in shaping or "target_modules" in shaping:
        traced, _ = _trace(counted, s)
    elif traced is not None and s.batch_size != before.batch_size:
        traced = traced.scaled((s.batch_size or 1) / (before.batch_size or 1))
    elif s.max_length != before.max_length:
        traced, _ = _trace(counted, s)
    return _planned(counted, s, traced)
