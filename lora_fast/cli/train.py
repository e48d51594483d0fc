"""``lora-fast train``: fine-tune a model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import typer

from ..errors import TrainingError
from ..training.config import INPUTS, TrainConfig, option_name
from ..training.folder import RUNS, last_run, open_run
from . import options as opt
from .errors import one_line_errors

DEFAULT = TrainConfig()


def train(
    context: typer.Context,
    model: opt.Model = DEFAULT.model,
    data: opt.Data = DEFAULT.data,
    eval_data: opt.EvalData = DEFAULT.eval_data,
    task: opt.Task = DEFAULT.task,
    train_on: opt.TrainOn = DEFAULT.train_on,
    max_length: opt.MaxLength = DEFAULT.max_length,
    method: opt.Method = DEFAULT.method,
    quantize: opt.Quantize = DEFAULT.quantize,
    r: opt.Rank = DEFAULT.r,
    alpha: opt.Alpha = DEFAULT.alpha,
    dropout: opt.Dropout = DEFAULT.dropout,
    target_modules: opt.TargetModules = DEFAULT.target_modules,
    experts: opt.Experts = DEFAULT.experts,
    lr_ratio: opt.LrRatio = DEFAULT.lr_ratio,
    delta_scale: opt.DeltaScale = DEFAULT.delta_scale,
    delta_start: opt.DeltaStart = DEFAULT.delta_start,
    frequencies: opt.Frequencies = DEFAULT.frequencies,
    virtual_tokens: opt.VirtualTokens = DEFAULT.virtual_tokens,
    lr: opt.LearningRate = DEFAULT.lr,
    steps: opt.Steps = DEFAULT.steps,
    epochs: opt.Epochs = DEFAULT.epochs,
    batch_size: opt.BatchSize = DEFAULT.batch_size,
    grad_accum: opt.GradAccum = DEFAULT.grad_accum,
    gradient_checkpointing: opt.GradientCheckpointing = DEFAULT.gradient_checkpointing,
    optim: opt.Optim = DEFAULT.optim,
    schedule: opt.Schedule = DEFAULT.schedule,
    warmup: opt.Warmup = DEFAULT.warmup,
    early_stopping: opt.EarlyStopping = DEFAULT.early_stopping,
    dtype: opt.Dtype = DEFAULT.dtype,
    seed: opt.Seed = DEFAULT.seed,
    compare: opt.Compare = DEFAULT.compare,
    out: opt.Out = None,
    save_every: opt.SaveEvery = DEFAULT.save_every,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    debug: opt.Debug = False,
) -> None:
    """Fine-tune a model with one of fifteen methods, fused where lora_fast supports it.

    Without options: QLoRA of a small pretrained model on built-in text, offline, in minutes.
    """
    if resume:
        out = out or last_run()
    with one_line_errors(out or RUNS, debug=debug):
        config = TrainConfig(**{f.name: context.params[f.name] for f in fields(TrainConfig)})
        moved: dict[str, str] = {}
        if out and resume:
            moved = refuse_other_options(context, config, TrainConfig.load(out))
        _train(config, out, moved, resume=resume, overwrite=overwrite, debug=debug)


def refuse_other_options(
    context: typer.Context, given: TrainConfig, stored: TrainConfig
) -> dict[str, str]:
    """Check that a resumed run keeps its options.

    Returns the inputs that were given again: the data, the base model.

    Raises TrainingError: an option on the command line differs from the one the run began with.
    """
    moved = {}
    given = given.located()
    for field in fields(TrainConfig):
        source = context.get_parameter_source(field.name)
        if source is None or source.name != "COMMANDLINE":
            continue
        asked, began = getattr(given, field.name), getattr(stored, field.name)
        if field.name in INPUTS and (asked is None) == (began is None):
            moved[field.name] = asked
        elif asked != began:
            option = option_name(field.name)
            raise TrainingError(f"--resume continues with {option} {began}, got {option} {asked}")
    return moved


def _train(
    config: TrainConfig,
    out: Path | None,
    moved: dict[str, str],
    *,
    resume: bool,
    overwrite: bool,
    debug: bool,
) -> None:
    from .console import Terminal, quiet_libraries

    terminal = Terminal()
    terminal.stage("Starting")
    if not debug:
        quiet_libraries()
    from ..training.run import run_training
    from .results import show_outcome

    opened = open_run(out, config, resume=resume, overwrite=overwrite, moved=moved)
    with terminal, opened as folder:
        outcome = run_training(folder, terminal)
    show_outcome(terminal.console, outcome)
