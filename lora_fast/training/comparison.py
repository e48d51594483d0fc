"""Every method on the same data, model and seeds: what each costs, and how well it does.

The time of a step (forward, backward, optimizer, rank allocation) is given as a ratio to the
*frozen floor*: forward and backward of the same base without any adapter, frozen, with the
gradient of its input, on the same batch within the same seconds.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import report
from ..errors import Interrupted, RunFailure, TrainingError, explain_write_failure, first_line
from ..files.json_files import write_json
from ..methods.base_model import Base
from ..methods.options import METHOD_OPTIONS
from ..methods.table import METHODS, method_of
from . import models
from .comparison_table import (
    BASELINE_TITLES,
    SCORE_TITLES,
    Result,
    facts,
    markdown,
    picture_title,
    without_numbers,
)
from .config import TrainConfig, option_name
from .data import load_rows
from .events import Observer, Silent
from .experiment import Experiment
from .folder import COMPARISON_FILE
from .measurement import (
    Batch,
    forward_backward,
    freeze,
    interleaved_ratio,
    peak_memory,
    saved_activation_bytes,
)
from .metrics import compute_context
from .models import parameter_counts
from .plots import plot_comparison
from .run import Material, assemble, check_machine, complete, evaluate, read_material, run_fused
from .summary import method_options, training_batches
from .trainer import train_arm, training_arguments

TABLE_FILE = "compare.md"
PICTURE_FILE = "compare.png"
WORK_FOLDER = ".work"
TIMED_BATCHES = 4
SCORES = {"classification": ("accuracy", "f1", "roc_auc"), "causal-lm": ("loss", "perplexity")}


@dataclass(frozen=True)
class Floor:
    """The base without any adapter, frozen; ``resident``: the bytes that it takes on the GPU."""

    model: Any
    resident: int


class OnlySteps(Silent):
    """Passes on the progress of training, and not the stages around it."""

    def __init__(self, observer: Observer, title: str) -> None:
        self.observer = observer
        self.title = title

    def note(self, text: str) -> None:
        self.observer.note(text)

    def training(self, arm: str, first_step: int, total_steps: int) -> None:
        self.observer.training(self.title, first_step, total_steps)

    def step(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        self.observer.step(step, loss, learning_rate, tokens_per_second)

    def trained(self) -> None:
        self.observer.trained()

    def done(self, *, well: bool = True) -> None:
        self.observer.done(well=well)


def chosen_methods(names: str | None) -> list[str]:
    """The methods named in ``a,b,c``, each once, in that order; all of them for None.

    Raises TrainingError: there is no such method.
    """
    if names is None:
        return list(METHODS)
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in wanted if name not in METHODS]
    if unknown or not wanted:
        got = ", ".join(unknown) or "none"
        raise TrainingError(f"--methods must be among {', '.join(METHODS)}, got {got}")
    return wanted


def config_for(config: TrainConfig, method: str) -> TrainConfig:
    """``config`` for another method, without the options that it does not use."""
    foreign: dict[str, Any] = {
        name: None for name in METHOD_OPTIONS if name not in METHODS[method].options
    }
    return replace(config, method=method, **foreign)


def _check_taken(config: TrainConfig, methods: list[str]) -> None:
    """Check that at least one method uses each option of methods that was given."""
    for name in METHOD_OPTIONS:
        given = getattr(config, name)
        if given is not None and not any(name in METHODS[method].options for method in methods):
            raise TrainingError(f"{option_name(name)} is not used by --methods {','.join(methods)}")


def compare_methods(
    config: TrainConfig, methods: list[str], seeds: int, out: Path, observer: Observer
) -> Result:
    """Train every method with every seed and return what ``compare.json`` holds.

    The file is rewritten after every method. A method that fails has the reason in its row, as
    ``error``, and one that this model or data has no place for as ``not_applicable``.

    Raises TrainingError: the data or the base model cannot be used at all; Interrupted: the user
    stopped (the file holds the methods that finished).
    """
    _check_taken(config, methods)
    check_machine(config)
    observer.stage("Reading the data")
    rows = load_rows(config)
    observer.stage("Loading the model")
    base = models.load_base(config, rows.labels)
    config = _shared(config, base, methods)
    observer.stage("Scoring the baselines")
    material = read_material(config, rows, base)
    found = _opening(config, base, material, seeds)
    for name, text in facts(found):
        observer.fact(name, text)
    for text in rows.notes:
        observer.note(text)
    _begin(found, out)
    resident = torch.cuda.memory_allocated() if base.device.type == "cuda" else 0
    floor = Floor(freeze(base.model), resident)
    for number, name in enumerate(methods, start=1):
        place = f" ({number} of {len(methods)})"
        try:
            row = _run_method(
                config_for(config, name), floor, material, seeds, out, observer, place
            )
            observer.done()
        except Interrupted as stop:
            raise Interrupted(out, None) from stop
        except Exception as error:  # one failure must not stop the other methods
            observer.done(well=False)
            observer.note(f"{METHODS[name].title}: {_reason(error, out)}")
            row = {"title": METHODS[name].title, _outcome(error): _reason(error, out)}
        found["methods"][name] = row
        _save(found, out)
    return found


def _shared(config: TrainConfig, base: Base, methods: list[str]) -> TrainConfig:
    """The options of all methods: examples are truncated so that the longest prompt fits too."""
    chosen = complete(config, base)
    limits = [chosen.max_length or 1]
    for name in methods:
        with suppress(TrainingError):  # reported in the row of the method
            limits.append(complete(config_for(config, name), base).max_length or 1)
    return replace(
        config,
        steps=chosen.steps,
        epochs=chosen.epochs,
        batch_size=chosen.batch_size,
        max_length=min(limits),
    )


def _opening(config: TrainConfig, base: Base, material: Material, seeds: int) -> Result:
    cuda = base.device.type == "cuda"
    return {
        "model": base.title,
        "parameters": models.base_parameters(base.model),
        "quantized": "nf4" if base.quantized else "none",
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": base.device.type,
        "threads": torch.get_num_threads(),
        "seeds": [config.seed + i for i in range(seeds)],
        "examples": material.counts,
        "memory": "peak on the GPU" if cuda else "what forward keeps for backward",
        "scores": list(SCORES[config.task]),
        "config": asdict(config),
        "baselines": material.baselines,
        "methods": {},
    }


def _run_method(
    config: TrainConfig,
    floor: Floor,
    material: Material,
    seeds: int,
    out: Path,
    observer: Observer,
    place: str,
) -> Result:
    began = time.monotonic()
    scores: list[dict[str, float]] = []
    losses: list[list[float]] = []
    costs: Result = {}
    for seed in range(config.seed, config.seed + seeds):
        setting = _setting(replace(config, seed=seed), material)
        title = f"{METHODS[config.method].title}{place}"
        if seeds > 1:
            title += f", seed {seed}"
        with _folder(out / WORK_FOLDER) as work:
            arm = train_arm("lora_fast", setting, work, OnlySteps(observer, title))
            scores.append(evaluate(setting))
            losses.append(arm.losses)
            if not costs:
                costs = _costs(setting, floor, work)
        del setting
        _release()
    return {
        "title": METHODS[config.method].title,
        "scores": {name: [found[name] for found in scores] for name in SCORES[config.task]},
        "losses": losses,
        **costs,
        "seconds": time.monotonic() - began,
    }


def _setting(config: TrainConfig, material: Material) -> Experiment:
    """A fresh base with the method's model around it, fused where that is supported."""
    base = models.load_base(config, material.rows.labels)
    setting = assemble(complete(config, base), base, material)
    # One checkpoint, at the end: nothing is resumed from it.
    setting = replace(setting, config=replace(setting.config, save_every=_save_every(setting)))
    run_fused(setting.model)
    return setting


def _save_every(setting: Experiment) -> int | None:
    return setting.config.save_every if setting.config.early_stopping else setting.steps


def _costs(setting: Experiment, floor: Floor, work: Path) -> Result:
    """What a step costs. Training continues during the timed steps."""
    layers = report(setting.model)
    trainable, total = parameter_counts(setting.model)
    setting.model.train()
    batches = training_batches(setting, TIMED_BATCHES)
    dtype, cuda = setting.base.dtype, setting.base.device.type == "cuda"
    memory: int | None = None
    if not cuda and not setting.config.gradient_checkpointing:
        memory = saved_activation_bytes(setting.model, batches[0], dtype)
    step = _stepper(setting, work)
    ratio = interleaved_ratio(
        step, lambda batch: forward_backward(floor.model, batch, dtype), batches
    )
    if cuda:
        memory = max(peak_memory(step, batch) for batch in batches) - floor.resident
    return {
        "options": method_options(setting.config),
        "learning_rate": setting.config.lr,
        "steps": setting.steps,
        "trainable_parameters": trainable,
        "trainable_percent": 100 * trainable / total,
        "step_ratio": ratio,
        "memory_bytes": memory,
        "adapted_layers": len(layers.layers),
        "fused_layers": sum(layer.fused for layer in layers.layers),
        "fallback_calls": layers.fallback_calls,
    }


def _stepper(setting: Experiment, work: Path) -> Any:
    """One whole step of training, as Trainer makes it, for one batch."""
    config, model, dtype = setting.config, setting.model, setting.base.dtype
    method = method_of(config)
    args = training_arguments(config, work, setting.steps, dtype)
    optimizer = method.optimize(model, args, config, setting.steps, method.head_rate)
    device = setting.base.device
    # A step in the middle of AdaLoRA's allocation, like most steps of a run.
    allocation = model.peft_config["default"].tinit + 1 if method.allocates_rank else 0

    def step(batch: Batch) -> None:
        with compute_context(device, dtype):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        if method.allocates_rank:
            model.base_model.update_and_allocate(allocation)
        model.zero_grad(set_to_none=True)

    return step


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """A temporary folder for checkpoints."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _outcome(error: Exception) -> str:
    applies = not isinstance(error, TrainingError) or isinstance(error, RunFailure)
    return "error" if applies else "not_applicable"


def _reason(error: Exception, out: Path) -> str:
    if isinstance(error, TrainingError):
        return str(error)
    written = explain_write_failure(error, out)
    return str(written) if written else f"{type(error).__name__}: {first_line(error)}"


def _begin(found: Result, out: Path) -> None:
    """Claim the folder for this comparison and delete the files of an earlier one."""
    for name in (TABLE_FILE, PICTURE_FILE):
        (out / name).unlink(missing_ok=True)
    write_json(found, out / COMPARISON_FILE)


def _save(found: Result, out: Path) -> None:
    """Write the numbers, the table and the picture."""
    write_json(found, out / COMPARISON_FILE)
    (out / TABLE_FILE).write_text(markdown(found), encoding="utf-8")
    if any(without_numbers(row) is None for row in found["methods"].values()):
        score = found["scores"][-1]
        baselines = {
            BASELINE_TITLES[name]: scores[score]
            for name, scores in found["baselines"].items()
            if score in scores
        }
        plot_comparison(
            [_drawn(row, score) for row in found["methods"].values()],
            SCORE_TITLES[score],
            out / PICTURE_FILE,
            picture_title(found),
            baselines=baselines,
        )


def _drawn(row: Result, score: str) -> Result:
    why = without_numbers(row)
    if why is not None:
        return {"title": row["title"], "without": ": ".join(why)}
    return {**row, "scores": row["scores"][score]}
