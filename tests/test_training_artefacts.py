"""What a run leaves behind: plots, valid JSON, and metrics that appear last and whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_fast import Report
from lora_fast.training import artefacts, json_files
from lora_fast.training.config import TrainConfig
from lora_fast.training.models import Base
from lora_fast.training.trainer import Arm

SUMMARY: dict[str, Any] = {
    "results": {"lora_fast": {"held_out": {"roc_auc": 0.87654}, "losses": [0.7, 0.6, 0.5]}}
}


class Saved:
    def save_pretrained(self, out: Path, **_: Any) -> None:
        (out / "saved").write_text("")


def setting(**options: Any) -> Any:
    base = Base("org/name", Saved(), Saved(), torch.float32, torch.device("cpu"), ["head"])
    return SimpleNamespace(
        config=TrainConfig(**options), base=base, model=Saved(), rows=SimpleNamespace(labels="ab")
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
    def fails(*_: object) -> None:
        raise OSError("disk")

    arms = {"lora_fast": Arm("lora_fast", [1.0, 0.5])}
    with monkeypatch.context() as patch:
        patch.setattr(artefacts, "plot_losses", fails)
        with pytest.raises(OSError, match="disk"):
            artefacts.save_artefacts(tmp_path, setting(), SUMMARY, arms, Report(()))
    assert not (tmp_path / "metrics.json").exists()
    artefacts.save_artefacts(tmp_path, setting(), SUMMARY, arms, Report(()))
    assert json.loads((tmp_path / "metrics.json").read_text()) == SUMMARY
    assert not list(tmp_path.glob("*.partial"))


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    card = artefacts.model_card(setting(r=3, alpha=32.0), SUMMARY, tmp_path)
    assert "base_model: org/name\nlibrary_name: peft" in card
    assert "# LoRA for name" in card
    assert "r = 3, alpha = 32, unquantised base, 3 steps." in card
    assert "| roc_auc | 0.8765 |" in card


def test_the_code_of_a_language_model(tmp_path: Path) -> None:
    given = setting(model="m", data="d", task="causal-lm")
    given.base.model.is_loaded_in_4bit = True
    code = artefacts.loading_code(given, tmp_path)
    compile(code, "card", "exec")
    assert "AutoModelForCausalLM.from_pretrained(" in code
    assert "num_labels" not in code
    assert "llm_int8_skip_modules=['head']" in code
