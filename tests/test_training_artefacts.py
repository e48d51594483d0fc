"""What a run leaves behind: plots, valid JSON, and metrics that appear last and whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lora_fast import Report
from lora_fast.training import artefacts
from lora_fast.training.config import TrainConfig
from lora_fast.training.models import Base

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


def lines_of(curves: dict[str, list[float]], path: Path) -> dict[str, Any]:
    """Draw the plot and return the lines with a label, by label."""
    kept: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt, "close", kept.append)
        artefacts.plot_losses(curves, path)
    (axes,) = kept[0].axes
    found = {str(line.get_label()): line for line in axes.get_lines()}
    plt.close(kept[0])
    return {label: line for label, line in found.items() if not label.startswith("_")}


def test_the_stock_curve_lies_over_ours(tmp_path: Path) -> None:
    curves = {"stock": [3.0, 2.0, 1.0], "lora_fast": [3.1, 2.1, 1.1]}
    lines = lines_of(curves, tmp_path / "loss.png")
    assert set(lines) == {"stock PEFT", "lora_fast"}
    assert list(lines["stock PEFT"].get_xdata()) == [1, 2, 3]
    assert list(lines["stock PEFT"].get_ydata()) == curves["stock"]
    assert list(lines["lora_fast"].get_ydata()) == curves["lora_fast"]
    assert lines["stock PEFT"].get_linestyle() == "--"
    assert lines["stock PEFT"].get_linewidth() < lines["lora_fast"].get_linewidth()
    assert matplotlib.image.imread(tmp_path / "loss.png").shape[:2] == (600, 1050)


def test_one_curve_alone(tmp_path: Path) -> None:
    assert set(lines_of({"lora_fast": [1.0]}, tmp_path / "loss.png")) == {"lora_fast"}


def test_running_means_look_back_only() -> None:
    assert artefacts.running_mean([4.0, 2.0, 0.0]) == [4.0, 2.0, 0.0]
    long = [float(i) for i in range(40)]
    found = artefacts.running_mean(long)
    assert found[:4] == [0.0, 0.5, 1.0, 1.5]
    assert found[39] == (36 + 37 + 38 + 39) / 4


def test_json_has_no_nan() -> None:
    values = {"a": [math.nan, 1.0], "b": {"c": math.inf, "d": "x"}, "e": True, "f": (2,)}
    assert artefacts.finite(values) == {
        "a": [None, 1.0],
        "b": {"c": None, "d": "x"},
        "e": True,
        "f": [2],
    }


def test_metrics_come_last_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("disk")

    curves = {"lora_fast": [1.0, 0.5]}
    with monkeypatch.context() as patch:
        patch.setattr(artefacts, "plot_losses", fails)
        with pytest.raises(OSError, match="disk"):
            artefacts.save_artefacts(tmp_path, setting(), SUMMARY, curves, Report(()))
    assert not (tmp_path / "metrics.json").exists()
    artefacts.save_artefacts(tmp_path, setting(), SUMMARY, curves, Report(()))
    assert json.loads((tmp_path / "metrics.json").read_text()) == SUMMARY
    assert not list(tmp_path.glob("*.partial"))


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    card = artefacts.model_card(setting(r=3), SUMMARY, tmp_path)
    assert "base_model: org/name\nlibrary_name: peft" in card
    assert "# LoRA adapter for name" in card
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
