"""What a run is: every option of ``lora-fast train``, checked once, stored with the run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import TrainingError, check_utf8
from ..files.json_files import write_json
from ..files.model_source import BUILTIN
from ..files.run_files import CONFIG_FILE, RECORD
from ..methods.options import BATCH_SIZE, MAX_LENGTH, QUANTIZERS, TASKS, MethodOptions
from ..methods.table import METHODS, check_options, completed, method_of

TRAIN_ON = ("assistant", "all")
SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Options that name the inputs of a run.
INPUTS = ("model", "data", "eval_data")

BUILTIN_STEPS = 300
BUILTIN_MAX_LENGTH = 64
EPOCHS = {"classification": 3.0, "causal-lm": 1.0}
WARMUP = 0.06
POSITIVE_INTEGERS = (
    "r",
    "frequencies",
    "virtual_tokens",
    "steps",
    "batch_size",
    "grad_accum",
    "max_length",
    "early_stopping",
    "save_every",
)


@dataclass(frozen=True)
class TrainConfig(MethodOptions):
    """The options of one run. None: chosen by :meth:`with_defaults`; an option that the method
    does not use stays None.

    Raises TrainingError: an option is outside its range, or two of them contradict each other.
    """

    model: str = BUILTIN
    data: str = BUILTIN
    eval_data: str | None = None
    train_on: str = "assistant"
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    grad_accum: int = 1
    max_length: int | None = None
    schedule: str = "cosine"
    warmup: float = WARMUP
    early_stopping: int | None = None
    dtype: str = "auto"
    save_every: int | None = None
    compare: bool = False

    def __post_init__(self) -> None:
        _one_of("--task", self.task, TASKS)
        _one_of("--train-on", self.train_on, TRAIN_ON)
        _one_of("--method", self.method, tuple(METHODS))
        _one_of("--quantize", self.quantize, QUANTIZERS)
        _one_of("--dtype", self.dtype, DTYPES)
        _one_of("--schedule", self.schedule, SCHEDULES)
        for name in POSITIVE_INTEGERS:
            _check(name, getattr(self, name), lambda v: v >= 1, "at least 1")
        for name in ("alpha", "lr", "epochs", "lr_ratio", "delta_scale"):
            _check(name, getattr(self, name), lambda v: 0 < v < float("inf"), "positive")
        for name in ("dropout", "warmup"):
            _check(name, getattr(self, name), lambda v: 0 <= v < 1, "in [0, 1)")
        for name in INPUTS:
            check_utf8(option_name(name), getattr(self, name) or "")
        _check("delta_start", self.delta_start, lambda v: v >= 0, "at least 0")
        _check("seed", self.seed, lambda v: 0 <= v < 2**32, "in [0, 2**32)")
        if self.steps is not None and self.epochs is not None:
            raise TrainingError("--steps and --epochs must not be given together")
        if self.model == BUILTIN and self.task != "classification":
            raise TrainingError("--task causal-lm needs --model: the built-in model is an encoder")
        if self.data == BUILTIN and self.task != "classification":
            raise TrainingError(
                "--task causal-lm needs --data FILE.jsonl: the built-in data is pairs"
            )
        if self.data == BUILTIN and self.eval_data is not None:
            raise TrainingError(
                "--eval-data needs --data FILE.jsonl: the built-in data has its own"
            )
        check_options(self)
        if self.compare and not method_of(self).fused:
            raise TrainingError(
                f"--method {self.method} has no fused layers to --compare with PEFT's"
            )

    def with_defaults(self, parameters: int) -> TrainConfig:
        """The same run with every None replaced by a default; of steps and epochs one stays.

        ``parameters`` is the size of the base model, which the learning rate depends on.
        """
        builtin = self.data == BUILTIN
        undecided = self.steps is None and self.epochs is None
        length = BUILTIN_MAX_LENGTH if builtin else MAX_LENGTH[self.task]
        return replace(
            completed(self, parameters),
            steps=BUILTIN_STEPS if undecided and builtin else self.steps,
            epochs=EPOCHS[self.task] if undecided and not builtin else self.epochs,
            batch_size=self.batch_size or BATCH_SIZE[self.task],
            max_length=self.max_length or length,
        )

    def located(self) -> TrainConfig:
        """The same run with absolute paths, so that it can be resumed from any folder."""
        names = {name: getattr(self, name) for name in INPUTS}
        paths: dict[str, Any] = {
            name: absolute(value) if name == "model" else os.path.abspath(value)
            for name, value in names.items()
            if value not in (None, BUILTIN)
        }
        return replace(self, **paths)

    def save(self, folder: Path, record: Mapping[str, Any] | None = None) -> None:
        """Write the options to ``folder/run.json``, where ``--resume`` finds them."""
        write_json({**asdict(self), RECORD: dict(record or {})}, folder / CONFIG_FILE)

    @classmethod
    def load(cls, folder: Path) -> TrainConfig:
        """Read the options of the run in ``folder``.

        Raises TrainingError: there is no run in ``folder``, or its options cannot be read.
        """
        path = folder / CONFIG_FILE
        try:
            stored: dict[str, Any] = json.loads(path.read_text())
            stored.pop(RECORD, None)
            unknown = set(stored) - {field.name for field in fields(cls)}
            if unknown:
                raise ValueError(f"unknown options {sorted(unknown)}")
            return cls(**stored)
        except FileNotFoundError:
            raise TrainingError(
                f"nothing to resume: {folder} holds no run; name its folder with --out"
            ) from None
        except (OSError, ValueError, TypeError, AttributeError, TrainingError) as error:
            raise TrainingError(f"cannot resume: {path} is unreadable ({error})") from error


def absolute(model: str) -> str:
    """The absolute path of a model's folder; a name of the hub as it is."""
    local = model.startswith((".", "/")) or Path(model).is_dir()
    return os.path.abspath(model) if local else model


def option_name(field: str) -> str:
    """How the command line spells a field of :class:`TrainConfig`."""
    return "--" + field.replace("_", "-")


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise TrainingError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


def _check(name: str, value: Any, holds: Any, rule: str) -> None:
    if value is not None and not holds(value):
        raise TrainingError(f"{option_name(name)} must be {rule}, got {value}")
