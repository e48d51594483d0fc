"""``lora-fast compare``: every method on the same data, model and seeds."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import typer

from ..errors import TrainingError
from ..files.model_source import BUILTIN
from ..training.config import TrainConfig
from ..training.folder import COMPARISON_FILE, RUNS, compared_methods, open_comparison
from . import options as opt
from .errors import EXIT_ERROR, one_line_errors
from .train import DEFAULT

BUILTIN_STEPS = 60


def compare(
    context: typer.Context,
    methods: opt.Methods = None,
    model: opt.Model = DEFAULT.model,
    data: opt.Data = DEFAULT.data,
    eval_data: opt.EvalData = DEFAULT.eval_data,
    task: opt.Task = DEFAULT.task,
    train_on: opt.TrainOn = DEFAULT.train_on,
    max_length: opt.MaxLength = DEFAULT.max_length,
    quantize: opt.Quantize = DEFAULT.quantize,
    target_modules: opt.TargetModules = DEFAULT.target_modules,
    steps: opt.CompareSteps = DEFAULT.steps,
    epochs: opt.Epochs = DEFAULT.epochs,
    batch_size: opt.BatchSize = DEFAULT.batch_size,
    grad_accum: opt.GradAccum = DEFAULT.grad_accum,
    gradient_checkpointing: opt.GradientCheckpointing = DEFAULT.gradient_checkpointing,
    schedule: opt.Schedule = DEFAULT.schedule,
    warmup: opt.Warmup = DEFAULT.warmup,
    dtype: opt.Dtype = DEFAULT.dtype,
    seed: opt.Seed = DEFAULT.seed,
    seeds: opt.Seeds = 1,
    out: opt.CompareOut = None,
    overwrite: opt.Overwrite = False,
    debug: opt.Debug = False,
) -> None:
    """Train every method on the same data, model and seeds, and compare cost and quality.

    Every method runs with its own defaults. The row of one that does not fit this model or data
    gives the reason; the exit code is 1 if one failed, or none was trained.
    """
    with one_line_errors(out or RUNS, debug=debug, interruption=_interruption):
        given = {f.name: context.params[f.name] for f in fields(TrainConfig) if f.name in _SHARED}
        if data == BUILTIN and steps is None and epochs is None:
            given["steps"] = BUILTIN_STEPS
        if seeds < 1:
            raise TrainingError(f"--seeds must be at least 1, got {seeds}")
        failed = _compare(
            TrainConfig(**given), methods, seeds, out, overwrite=overwrite, debug=debug
        )
    if failed:
        raise typer.Exit(EXIT_ERROR)


_SHARED = frozenset(
    {
        "model",
        "data",
        "eval_data",
        "task",
        "train_on",
        "max_length",
        "quantize",
        "target_modules",
        "steps",
        "epochs",
        "batch_size",
        "grad_accum",
        "gradient_checkpointing",
        "schedule",
        "warmup",
        "dtype",
        "seed",
    }
)


def _compare(
    config: TrainConfig,
    methods: str | None,
    seeds: int,
    out: Path | None,
    *,
    overwrite: bool,
    debug: bool,
) -> bool:
    """Run the comparison, show its table, and return whether any method failed, or none applied."""
    from .console import Terminal, quiet_libraries

    terminal = Terminal()
    terminal.stage("Starting")
    if not debug:
        quiet_libraries()
    from ..training.comparison import chosen_methods, compare_methods
    from .results import show_comparison

    with terminal, open_comparison(out, overwrite=overwrite) as folder:
        wanted = chosen_methods(methods)
        found = compare_methods(config, wanted, seeds, folder, terminal)
    show_comparison(terminal.console, found, folder)
    rows = found["methods"].values()
    return any("error" in row for row in rows) or all("not_applicable" in row for row in rows)


def _interruption(stop: BaseException, out: Path) -> str:
    done = compared_methods(out)
    if not done:
        return "interrupted before the first method finished"
    path = out / COMPARISON_FILE
    return f"interrupted; {path} and the table beside it have the {len(done)} finished"
