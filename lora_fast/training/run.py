"""A whole run, from options to artefacts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import Report, accelerate, report
from ..acceleration.report import adapted_layers
from ..backends.choice import check_driver, uses_triton
from ..errors import TrainingError
from ..files.json_files import finite
from ..methods.base_model import Base
from ..methods.table import method_of
from . import metrics, models
from .artefacts import save_artefacts
from .checkpoints import ARMS
from .config import TrainConfig
from .data import Collator, Rows, load_rows, split_rows
from .encoding import Encoded, Example, count_examples, encode
from .events import Observer
from .experiment import Experiment
from .folder import RunFolder
from .inputs import changed, inputs_of
from .summary import arm_summary, comparison_summary, facts, notes, run_summary
from .trainer import Arm, check_optimizer, total_steps, train_arm
from .weights import capture, restore


@dataclass(frozen=True)
class Material:
    """The encoded data of a run, and the baselines to beat.

    ``counts``: how the examples were used, see :func:`.encoding.count_examples`.
    """

    rows: Rows
    train: list[Example]
    validation: list[Example]
    held_out: list[Example]
    counts: dict[str, Any]
    baselines: dict[str, metrics.Scores]


@dataclass(frozen=True)
class Outcome:
    """A finished run: the contents of ``metrics.json``, and the report on the adapted layers.

    ``report`` is None if the run had already finished before.
    """

    out: Path
    metrics: dict[str, Any]
    report: Report | None


def run_training(folder: RunFolder, observer: Observer) -> Outcome:
    """Train, evaluate and save. An arm with checkpoints in the folder resumes from its last one.

    A finished run stays as it is.

    Raises TrainingError: the data, the model or an option does not allow it; Interrupted: the user
    stopped it.
    """
    config, out = folder.config, folder.path
    finished = folder.results()
    if finished is not None:
        observer.note(f"The run in {out} has finished: nothing is left to train.")
        return Outcome(out, finished, None)
    check_machine(config)
    observer.stage("Reading the data")
    rows = load_rows(config)
    inputs = inputs_of(config, rows)
    other = changed(folder.record.get("inputs", {}), inputs, config, set(folder.moved))
    for option, what in other.items():
        observer.note(f"Continuing with another {option}: {what}")
    setting = _set_up(config, rows, observer)
    for name, text in facts(setting):
        observer.fact(name, text)
    for text in [*rows.notes, *notes(setting)]:
        observer.note(text)
    folder.record["pad_token_id"] = setting.base.tokenizer.pad_token_id
    folder.begin(inputs, list(other))
    initial = capture(setting.model, frozen=method_of(config).changes_weights)
    arms: dict[str, Arm] = {}
    results: dict[str, dict[str, Any]] = {}
    for name in ARMS if config.compare else ARMS[1:]:
        restore(setting.model, initial)
        if name == "lora_fast":
            run_fused(setting.model)
        arms[name] = train_arm(name, setting, out, observer)
        observer.stage("Scoring on held-out examples")
        results[name] = arm_summary(arms[name], setting, evaluate(setting))
    layers = report(setting.model)
    found = run_summary(setting, layers, results)
    found["resumed"] = folder.record.get("resumed", [])
    if config.compare:
        observer.stage("Timing stock PEFT and lora_fast in turns")
        found["comparison"] = comparison_summary(arms["stock"], arms["lora_fast"], setting, results)
    observer.stage("Saving")
    save_artefacts(folder, setting, found, arms, layers)
    return Outcome(out, finite(found), layers)


def check_machine(config: TrainConfig) -> None:
    """Check, before anything is read, that the optimizer and the backend run on this machine.

    Raises TrainingError: one of them does not run here.
    """
    device, _ = models.choose_device_and_dtype(config.dtype)
    check_optimizer(config.optim, device)
    if uses_triton(device):
        try:
            check_driver()
        except ValueError as error:
            raise TrainingError(str(error)) from error


def read_material(config: TrainConfig, rows: Rows, base: Base) -> Material:
    """Encode the examples, reserve some for early stopping, and score the baselines.

    ``config`` has no unknowns.

    Raises TrainingError: too few examples are left to train on.
    """
    train_rows, validation_rows = rows.train, list[Any]()
    if config.early_stopping:
        train_rows, validation_rows = split_rows(
            rows.train, config.seed, "--early-stopping, which holds back a part of --data"
        )
    collator = Collator(base.tokenizer)
    sides = {
        "train": encode(train_rows, base.tokenizer, config),
        "validation": (
            encode(validation_rows, base.tokenizer, config) if validation_rows else Encoded([])
        ),
        "held_out": encode(rows.held_out, base.tokenizer, config),
    }
    counts = count_examples(
        sides,
        config,
        chats=any("messages" in row for row in [*rows.train, *rows.held_out]),
        whole_model=config.max_length == _room(config, base),
    )
    train, validation, held_out = (side.examples for side in sides.values())
    baselines = _baselines(config, base, train, held_out, collator)
    return Material(rows, train, validation, held_out, counts, baselines)


def assemble(config: TrainConfig, base: Base, material: Material) -> Experiment:
    """Put the method's model around the base, its initial weights drawn from the run's seed.

    ``config`` has no unknowns.

    Raises TrainingError: the method does not fit this model.
    """
    steps = total_steps(config, len(material.train))
    torch.manual_seed(config.seed)
    return Experiment(
        config=config,
        base=base,
        rows=material.rows,
        train=material.train,
        held_out=material.held_out,
        collator=Collator(base.tokenizer),
        baselines=material.baselines,
        model=models.add_adapter(base, config, steps),
        steps=steps,
        validation=material.validation,
        counts=material.counts,
    )


def complete(config: TrainConfig, base: Base) -> TrainConfig:
    """The options without unknowns, for this model.

    Raises TrainingError: ``--max-length`` is more than the model accepts.
    """
    chosen = config.with_defaults(models.base_parameters(base.model))
    limit = _room(chosen, base)
    if limit < 1:
        raise TrainingError(
            f"--virtual-tokens must be below the {models.position_limit(base)} positions of "
            f"{base.name}, got {chosen.virtual_tokens}"
        )
    if config.max_length is not None and config.max_length > limit:
        raise TrainingError(f"--max-length must be at most {limit} for {base.name}")
    return replace(chosen, max_length=min(chosen.max_length or limit, limit))


def _room(config: TrainConfig, base: Base) -> int:
    """How many tokens of an example the model accepts."""
    return models.position_limit(base) - (config.virtual_tokens or 0)


def run_fused(model: Any) -> None:
    """Accelerate the layers that lora_fast supports, if the method has adapted layers."""
    if next(adapted_layers(model), None) is not None:
        accelerate(model)


def evaluate(setting: Experiment) -> metrics.Scores:
    """The model's scores on the held-out examples."""
    score: Callable[..., metrics.Scores] = metrics.evaluate_causal_lm
    if setting.config.task == "classification":
        score = metrics.evaluate_classification
    return score(setting.model, setting.held_out, setting.collator, setting.base.dtype)


def _set_up(config: TrainConfig, rows: Rows, observer: Observer) -> Experiment:
    observer.stage("Loading the model")
    base = models.load_base(config, rows.labels)
    if base.new_modules:
        observer.note(f"Not in the checkpoint, trained in full: {', '.join(base.new_modules)}")
    config = complete(config, base)
    observer.stage("Scoring the baselines")
    return assemble(config, base, read_material(config, rows, base))


def _baselines(
    config: TrainConfig,
    base: Base,
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
