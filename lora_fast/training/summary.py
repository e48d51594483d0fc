"""The numbers of a run as ``metrics.json`` holds them, and as the command line prints them."""

from __future__ import annotations

import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import lora_fast

from ..acceleration.report import adapted_layers
from ..magnitudes import short_count
from ..methods.base_model import Base
from ..methods.table import method_of
from ..methods.targets import ALL_LINEAR, about_left_out
from .config import TrainConfig
from .data import LengthGroupedOrder
from .effective_rank import summarise
from .encoding import describe_examples
from .experiment import Experiment
from .measurement import Batch, interleaved_step_times, saved_activation_bytes
from .models import parameter_counts
from .trainer import Arm

TIMED_BATCHES = 4

Summary = dict[str, Any]


def facts(setting: Experiment) -> list[tuple[str, str]]:
    """The properties of a run, by name: model, data, method, run."""
    config, base = setting.config, setting.base
    trainable, total = parameter_counts(setting.model)
    size = short_count(total - trainable)
    kind = "NF4" if base.quantized else "unquantised"
    dtype = str(base.dtype).removeprefix("torch.")
    step_size = (config.batch_size or 1) * config.grad_accum
    options = "".join(f"{name} {value}, " for name, value in method_options(config).items())
    return [
        ("Model", f"{base.title}, {size} parameters, {kind}, {dtype} on {_device(base)}"),
        ("Data", describe_examples(setting.counts)),
        ("Method", f"{method_of(config).title}: {options}{trainable:,} parameters to train"),
        ("Run", f"{setting.steps:,} steps of {step_size} examples, learning rate {config.lr:g}"),
    ]


def picture_title(setting: Experiment) -> str:
    """What the pictures of a run are of: method and model, data and steps, seed, device."""
    config, base = setting.config, setting.base
    kind = "NF4" if base.quantized else "unquantised"
    rank = f", r = {config.r}" if config.r else ""
    dtype = str(base.dtype).removeprefix("torch.")
    step_size = (config.batch_size or 1) * config.grad_accum
    return (
        f"{method_of(config).title}{rank}, on {base.title} ({kind}, {dtype})\n"
        f"{Path(config.data).name}: {setting.counts['train']:,} examples to train; "
        f"{setting.steps:,} steps of {step_size}, seed {config.seed}; {_device(base)}"
    )


def notes(setting: Experiment) -> list[str]:
    """What to say of the adapter before it trains."""
    everywhere = setting.config.target_modules == ALL_LINEAR
    left_out = about_left_out(setting.model) if everywhere else []
    rank = _rank_note(setting)
    return [*([rank] if rank else []), *left_out]


def _rank_note(setting: Experiment) -> str | None:
    """A note on a rank that exceeds the smaller side of some layers."""
    config = setting.config
    layers: list[Any] = [
        layer for _, layer in adapted_layers(setting.model) if hasattr(layer, "lora_A")
    ]
    sides = [min(layer.in_features, layer.out_features) for layer in layers]
    wide = sum(config.r is not None and config.r > side for side in sides)
    if not wide:
        return None
    return (
        f"--r {config.r:,} is more than the smaller side of {wide} of {len(sides)} layers (from "
        f"{min(sides):,}): a lower rank can hold every update of them"
    )


def method_options(config: TrainConfig) -> dict[str, str]:
    """The options that define the method, by name, as text."""
    shown = [name for name in method_of(config).options if name not in ("optim", "target_modules")]
    given = {name: getattr(config, name) for name in shown}
    return {
        name.replace("_", "-"): f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in given.items()
        if value not in (None, 0.0)
    }


def arm_summary(arm: Arm, setting: Experiment, held_out: dict[str, float]) -> Summary:
    """One arm's results. Call it while the model still computes as in that arm.

    ``step_seconds`` is the median optimizer step, ``tokens_per_second`` counts tokens that are not
    padding; both cover all steps, whichever process ran them. ``saved_activation_bytes`` is None
    with gradient checkpointing, which hides its tensors from the count.
    """
    saved = None
    if not setting.config.gradient_checkpointing:
        setting.model.train()
        batch = training_batches(setting, 1)[0]
        saved = saved_activation_bytes(setting.model, batch, setting.base.dtype)
    return {
        "held_out": held_out,
        "losses": arm.losses,
        "best_step": arm.best_step,
        "stopped_early": len(arm.losses) < arm.planned,
        "effective_rank": summarise(arm.ranks),
        "step_seconds": statistics.median(arm.step_seconds) if arm.step_seconds else None,
        "tokens_per_second": arm.tokens_per_second or None,
        "saved_activation_bytes": saved,
    }


def run_summary(
    setting: Experiment, layers: lora_fast.Report, results: dict[str, Summary]
) -> Summary:
    """Everything about a run except the comparison of its arms."""
    trainable, total = parameter_counts(setting.model)
    return {
        "lora_fast": lora_fast.__version__,
        "versions": _versions(),
        "device": _device(setting.base),
        "threads": torch.get_num_threads(),
        "dtype": str(setting.base.dtype).removeprefix("torch."),
        "model": setting.base.name,
        "quantized": "nf4" if setting.base.quantized else "none",
        "config": asdict(setting.config.located()),
        "labels": setting.rows.labels,
        "examples": setting.counts,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_percent": 100 * trainable / total,
        "fused": {
            "backend": "triton" if _uses_triton(setting.base.device) else "torch",
            "adapted_layers": len(layers.layers),
            "fused_layers": sum(layer.fused for layer in layers.layers),
            "fused_calls": layers.fused_calls,
            "fallback_calls": layers.fallback_calls,
            "uncounted_layers": sum(not layer.counted for layer in layers.layers),
            "all_fused": layers.all_fused,
        },
        "baselines": setting.baselines,
        "results": results,
    }


def comparison_summary(
    stock: Arm, ours: Arm, setting: Experiment, results: dict[str, Summary]
) -> Summary:
    """Stock PEFT beside lora_fast: curves, step times taken in turns, saved bytes.

    Ratios are lora_fast / stock. ``max_relative_loss_difference`` is over all steps.
    """
    # Early stopping may end one arm before the other.
    pairs = list(zip(stock.losses, ours.losses, strict=False))
    times = interleaved_step_times(
        setting.model, training_batches(setting, TIMED_BATCHES), setting.base.dtype
    )
    bytes_of = [results[name]["saved_activation_bytes"] for name in ("lora_fast", "stock")]
    return {
        "max_relative_loss_difference": max(abs(a - b) / abs(a) for a, b in pairs),
        "step_time_ratio": times.ratio,
        "forward_backward_seconds": {"stock": times.stock, "lora_fast": times.lora_fast},
        "timed_pairs": times.pairs,
        "saved_activation_ratio": None if None in bytes_of else bytes_of[0] / bytes_of[1],
    }


def training_batches(setting: Experiment, count: int) -> list[Batch]:
    """The first ``count`` batches of the run, on the model's device."""
    size = setting.config.batch_size or 1
    lengths = [len(example["input_ids"]) for example in setting.train]
    step_size = size * setting.config.grad_accum
    order = list(LengthGroupedOrder(lengths, step_size, setting.config.seed))[: count * size]
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    collated = (setting.collator([setting.train[i] for i in indices]) for indices in batches)
    device = setting.base.device
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in collated]


def _uses_triton(device: torch.device) -> bool:
    from ..backends.choice import uses_triton

    return uses_triton(device)


def _device(base: Base) -> str:
    device = base.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _versions() -> dict[str, str]:
    """Versions of the libraries that computed; of bitsandbytes if it was there."""
    modules = (sys.modules.get(name) for name in ("torch", "transformers", "peft", "bitsandbytes"))
    return {module.__name__: str(module.__version__) for module in modules if module is not None}
