"""Files of a run: plots, valid JSON, and metrics that appear last and complete."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from lora_fast import Report
from lora_fast.errors import TrainingError
from lora_fast.files import json_files
from lora_fast.files.run_files import stored_record
from lora_fast.methods.base_model import Base
from lora_fast.training import artefacts
from lora_fast.training.config import TrainConfig
from lora_fast.training.data import Rows
from lora_fast.training.folder import RunFolder
from lora_fast.training.trainer import Arm

SUMMARY: dict[str, Any] = {
    "results": {"lora_fast": {"held_out": {"roc_auc": 0.87654}, "losses": [0.7, 0.6, 0.5]}},
    "resumed": [],
    "examples": {
        "train": 9,
        "validation": 0,
        "held_out": 1,
        "left_out": {},
        "cut": 0,
        "max_length": 8,
        "whole_model": False,
        "learned": "labels",
    },
}
ARM = Arm("lora_fast", [0.7, 0.6, 0.5], planned=3)


class Saved:
    """A model of PEFT's, and a tokenizer."""

    peft_config: ClassVar = {}

    def save_pretrained(self, out: Path, **_: Any) -> None:
        (out / "saved").write_text("")


def setting(**options: Any) -> Any:
    base = Base("org/name", Saved(), Saved(), torch.float32, torch.device("cpu"), ["head"])
    return SimpleNamespace(
        config=TrainConfig(**options),
        base=base,
        model=Saved(),
        rows=Rows([], [], ["a", "b"]),
        counts=SUMMARY["examples"],
        steps=3,
    )


def test_json_has_no_nan() -> None:
    values = {"a": [math.nan, 1.0], "b": {"c": math.inf, "d": "x"}, "e": True, "f": (2,)}
    assert json_files.finite(values) == {
        "a": [None, 1.0],
        "b": {"c": None, "d": "x"},
        "e": True,
        "f": [2],
    }


def test_metrics_come_last_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("disk")

    arms = {"lora_fast": Arm("lora_fast", [1.0, 0.5])}
    run = RunFolder(tmp_path, TrainConfig(), resumed=False)
    with monkeypatch.context() as patch:
        patch.setattr(artefacts, "plot_losses", fails)
        with pytest.raises(OSError, match="disk"):
            artefacts.save_artefacts(run, setting(), SUMMARY, arms, Report(()))
    assert list(tmp_path.iterdir()) == []
    artefacts.save_artefacts(run, setting(), SUMMARY, arms, Report(()))
    assert json.loads((tmp_path / "metrics.json").read_text()) == SUMMARY
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"metrics.json", "README.md", "layers.txt", "loss.png", "saved", "run.json"}
    assert {*stored_record(tmp_path)["files"], "run.json"} == names


def test_a_file_that_came_while_a_run_trained_is_not_overwritten(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, TrainConfig(), resumed=False)
    run.begin({}, [])
    (tmp_path / "saved").write_text("mine")
    arms = {"lora_fast": Arm("lora_fast", [1.0, 0.5])}
    with pytest.raises(TrainingError, match="holds saved, which this run has not written: move"):
        artefacts.save_artefacts(run, setting(), SUMMARY, arms, Report(()))
    assert (tmp_path / "saved").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "run.json"}
    (tmp_path / "saved").unlink()
    artefacts.save_artefacts(run, setting(), SUMMARY, arms, Report(()))
    assert (tmp_path / "metrics.json").exists()


def test_the_card_says_where_the_run_went_on_with_other_inputs(tmp_path: Path) -> None:
    resumed = [{"step": 20, "changed": ["--data", "--model"]}]
    card = artefacts.model_card(setting(), {**SUMMARY, "resumed": resumed}, ARM, tmp_path)
    assert "\n\nResumed at step 20 with another --data and --model.\n" in card


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    card = artefacts.model_card(setting(r=3, alpha=32.0), SUMMARY, ARM, tmp_path)
    assert "base_model: org/name\nlibrary_name: peft" in card
    assert "# LoRA for name" in card
    assert "r = 3, alpha = 32, unquantised base, 3 steps." in card
    assert "| roc_auc | 0.8765 |" in card
    assert "builtin: 9 examples to train, 1 held out." in card


def test_the_card_and_the_picture_say_where_training_stopped(tmp_path: Path) -> None:
    arm = Arm("lora_fast", [1.0] * 20, best_step=12, planned=40)
    card = artefacts.model_card(setting(), SUMMARY, arm, tmp_path)
    assert (
        "base, 20 steps of 40, stopped early; the weights of step 12 are kept, the best on the "
        "examples held back." in card
    )
    marked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artefacts, "plot_losses", lambda *_, best_step: marked.append(best_step))
        run = RunFolder(tmp_path, TrainConfig(), resumed=False)
        artefacts.save_artefacts(run, setting(), SUMMARY, {"lora_fast": arm}, Report(()))
    assert marked == [12]


def test_the_code_of_a_language_model(tmp_path: Path) -> None:
    given = setting(model="m", data="d", task="causal-lm")
    given.base.model.is_loaded_in_4bit = True
    code = artefacts.loading_code(given, tmp_path)
    compile(code, "card", "exec")
    assert "AutoModelForCausalLM.from_pretrained(" in code
    assert "num_labels" not in code
    assert "llm_int8_skip_modules=['head']" in code
