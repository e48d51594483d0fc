"""The options of a run: ranges, defaults, and storage on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_fast.errors import TrainingError
from lora_fast.files.run_files import CONFIG_FILE
from lora_fast.training.config import TrainConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "--r must be at least 1, got 0"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"batch_size": -1}, "--batch-size must be at least 1, got -1"),
        ({"grad_accum": 0}, "--grad-accum must be at least 1, got 0"),
        ({"lr": 0.0}, "--lr must be positive, got 0.0"),
        ({"lr": float("nan")}, "--lr must be positive, got nan"),
        ({"alpha": float("inf")}, "--alpha must be positive, got inf"),
        ({"epochs": -2.0}, "--epochs must be positive, got -2.0"),
        ({"dropout": 1.0}, r"--dropout must be in \[0, 1\), got 1.0"),
        ({"seed": -1}, "--seed must be in"),
        ({"quantize": "int8"}, "--quantize must be one of nf4, none, got 'int8'"),
        ({"task": "regression"}, "--task must be one of classification, causal-lm"),
        ({"dtype": "half"}, "--dtype must be one of auto"),
        ({"steps": 1, "epochs": 1.0}, "--steps and --epochs must not be given together"),
        ({"task": "causal-lm", "data": "x.jsonl"}, "--task causal-lm needs --model"),
        ({"task": "causal-lm", "model": "x"}, "--task causal-lm needs --data"),
        ({"eval_data": "x.jsonl"}, "--eval-data needs --data"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainConfig(**options)


def test_defaults_of_the_builtin_run() -> None:
    found = TrainConfig().with_defaults(22_000_000)
    assert (found.r, found.alpha, found.dropout, found.quantize) == (16, 32.0, 0.0, "nf4")
    assert (found.lr, found.batch_size, found.max_length) == (5e-4, 32, 64)
    assert found.steps is not None
    assert found.epochs is None


@pytest.mark.parametrize(
    ("task", "epochs", "batch_size", "max_length"),
    [("classification", 3.0, 32, 256), ("causal-lm", 1.0, 8, 1024)],
)
def test_defaults_of_other_data(task: str, epochs: float, batch_size: int, max_length: int) -> None:
    found = TrainConfig(model="m", data="d.jsonl", task=task).with_defaults(7_000_000_000)
    assert (found.steps, found.epochs) == (None, epochs)
    assert (found.batch_size, found.max_length, found.lr) == (batch_size, max_length, 2e-4)


def test_what_is_given_is_kept() -> None:
    given = TrainConfig(steps=7, lr=0.5, batch_size=3, max_length=9, r=2, alpha=1.0)
    found = given.with_defaults(10)
    assert (found.steps, found.lr, found.batch_size, found.max_length) == (7, 0.5, 3, 9)
    assert (found.r, found.alpha) == (2, 1.0)
    assert found.with_defaults(10) == found
    assert TrainConfig(epochs=0.5).with_defaults(10).steps is None


def test_options_survive_on_disk(tmp_path: Path) -> None:
    config = TrainConfig(r=3, epochs=1.5, compare=True)
    config.save(tmp_path)
    assert TrainConfig.load(tmp_path) == config


@pytest.mark.parametrize("content", ["{", "[]", '{"rank": 1}', '{"r": 0}', '{"r": "x"}'])
def test_stored_options_that_make_no_sense(tmp_path: Path, content: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(TrainingError, match=r"cannot resume: .*run\.json is unreadable"):
        TrainConfig.load(tmp_path)


def test_nothing_stored(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing to resume"):
        TrainConfig.load(tmp_path)


def test_stored_options_are_json(tmp_path: Path) -> None:
    TrainConfig().save(tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["model"] == "builtin"
