"""A whole run, from options to artefacts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_fast import Report, accelerate, report

from . import metrics, models
from .artefacts import METRICS_FILE, save_artefacts
from .checkpoints import CHECKPOINTS
from .config import CONFIG_FILE, TrainConfig
from .data import Collator, Example, encode, load_rows
from .errors import TrainingError
from .events import Observer
from .experiment import Experiment
from .summary import arm_summary, comparison_summary, facts, run_summary
from .trainer import Arm, check_optimizer, train_arm


@dataclass(frozen=True)
class Outcome:
    """A finished run: what ``metrics.json`` holds, and the report on the adapted layers."""

    out: Path
    metrics: dict[str, Any]
    report: Report


def prepare_out(out: Path, config: TrainConfig, *, resume: bool, overwrite: bool) -> TrainConfig:
    """Make ``out`` ready and return the options of the run: the stored ones when resuming.

    Raises:
        TrainingError: ``out`` holds another run, or none to resume.
        OSError: ``out`` cannot be written.
    """
    if resume:
        return TrainConfig.load(out)
    if (out / CONFIG_FILE).exists() and not overwrite:
        raise TrainingError(
            f"{out} already holds a run: continue it with --resume, replace it with --overwrite, "
            "or choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    if (out / CHECKPOINTS).exists():
        shutil.rmtree(out / CHECKPOINTS)
    (out / METRICS_FILE).unlink(missing_ok=True)
    config.save(out)
    return config


def run_training(config: TrainConfig, out: Path, observer: Observer) -> Outcome:
    """Train, evaluate and save. An arm with checkpoints in ``out`` goes on from its last one.

    Raises:
        TrainingError: the data, the model or an option does not allow it.
        Interrupted: the user stopped it.
    """
    check_optimizer(config.optim, models.choose_device_and_dtype(config.dtype)[0])
    setting = _set_up(config, observer)
    for name, text in facts(setting):
        observer.fact(name, text)
    initial = {n: p.detach().clone() for n, p in _trainable(setting.model)}
    arms: dict[str, Arm] = {}
    results: dict[str, dict[str, Any]] = {}
    for name in ["stock", "lora_fast"] if config.compare else ["lora_fast"]:
        for parameter_name, parameter in _trainable(setting.model):
            parameter.data.copy_(initial[parameter_name])
        if name == "lora_fast":
            accelerate(setting.model)
        arms[name] = _train(name, setting, out, observer)
        observer.stage("Scoring on held-out examples")
        results[name] = arm_summary(arms[name], setting, _evaluate(setting))
    layers = report(setting.model)
    found = run_summary(setting, layers, results)
    if config.compare:
        observer.stage("Timing stock PEFT and lora_fast in turns")
        found["comparison"] = comparison_summary(arms["stock"], arms["lora_fast"], setting, results)
    observer.stage("Saving")
    save_artefacts(out, setting, found, {name: arm.losses for name, arm in arms.items()}, layers)
    return Outcome(out, found, layers)


def _set_up(config: TrainConfig, observer: Observer) -> Experiment:
    observer.stage("Reading the data")
    rows = load_rows(config)
    observer.stage("Loading the model")
    base = models.load_base(config, rows.labels)
    if base.new_modules:
        observer.note(f"Not in the checkpoint, trained in full: {', '.join(base.new_modules)}")
    config = _complete(config, base)
    train, held_out = (encode(side, base.tokenizer, config) for side in (rows.train, rows.held_out))
    collator = Collator(base.tokenizer)
    observer.stage("Scoring the baselines")
    baselines = _baselines(config, base, train, held_out, collator)
    torch.manual_seed(config.seed)
    model = models.add_adapter(base, config)
    return Experiment(config, base, rows, train, held_out, collator, baselines, model)


def _complete(config: TrainConfig, base: models.Base) -> TrainConfig:
    limit = models.position_limit(base)
    if config.max_length is not None and config.max_length > limit:
        raise TrainingError(f"--max-length must be at most {limit} for {base.name}")
    complete = config.with_defaults(models.base_parameters(base.model))
    return replace(complete, max_length=min(complete.max_length or limit, limit))


def _train(name: str, setting: Experiment, out: Path, observer: Observer) -> Arm:
    return train_arm(
        name,
        setting.model,
        setting.train,
        setting.collator,
        setting.config,
        out,
        setting.base.dtype,
        observer,
    )


def _evaluate(setting: Experiment) -> metrics.Scores:
    evaluate: Callable[..., metrics.Scores] = metrics.evaluate_causal_lm
    if setting.config.task == "classification":
        evaluate = metrics.evaluate_classification
    return evaluate(setting.model, setting.held_out, setting.collator, setting.base.dtype)


def _baselines(
    config: TrainConfig,
    base: models.Base,
    train: list[Example],
    held_out: list[Example],
    collator: Collator,
) -> dict[str, metrics.Scores]:
    if config.task == "causal-lm":
        scores = metrics.evaluate_causal_lm(base.model, held_out, collator, base.dtype)
        return {"base_model": scores}
    classes = base.model.config.num_labels
    return {
        "majority": metrics.majority_baseline(train, held_out, classes),
        "linear_probe": metrics.linear_probe(base.model, train, held_out, collator, base.dtype),
    }


def _trainable(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]
