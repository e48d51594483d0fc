"""The pictures: what they draw, that nothing is cut, and that they are written."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from pictures import check_all, kept_figures

from lora_fast.training import plots

TITLE = (
    "LoRA, r = 16, on Meta-Llama-3.1-8B-Instruct (NF4, bfloat16)\n"
    "conversations-of-a-whole-year.jsonl: 123,456 examples to train; 3,000 steps of 8, seed 0; "
    "NVIDIA H100 80GB HBM3"
)


def lines_of(curves: dict[str, list[float]], path: Path) -> dict[str, Any]:
    """Draw the plot and return the lines with a label, by label."""
    with kept_figures() as figures:
        plots.plot_losses(curves, path, TITLE)
        (axes,) = figures[0].axes
        found = {str(line.get_label()): line for line in axes.get_lines()}
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
    assert matplotlib.image.imread(tmp_path / "loss.png").shape[1] == 150 * plots.WIDTH


def test_one_curve_alone(tmp_path: Path) -> None:
    assert set(lines_of({"lora_fast": [1.0]}, tmp_path / "loss.png")) == {"lora_fast"}


@pytest.mark.parametrize("steps", [40, 3000])
def test_the_mean_is_named_and_each_step_is_drawn_of_both(tmp_path: Path, steps: int) -> None:
    draw = random.Random(0)
    losses = [4.0 * math.exp(-i / steps) + draw.random() for i in range(steps)]
    curves = {"stock": losses, "lora_fast": [loss + 0.001 for loss in losses]}
    path = tmp_path / "loss.png"
    (written,) = check_all(lambda: plots.plot_losses(curves, path, TITLE, best_step=steps // 2))
    window = min(20, steps // 10)
    for text in (
        f"lora_fast, mean of the last {window} steps",
        f"stock PEFT, mean of the last {window} steps",
        "each step",
        f"kept: step {steps // 2}",
    ):
        assert text in written, text
    assert any(text.startswith("LoRA, r = 16, on Meta") for text in written)
    with kept_figures() as figures:
        plots.plot_losses(curves, path, TITLE)
        lengths = [len(line.get_xdata()) for line in figures[0].axes[0].get_lines()]
    assert lengths.count(steps) == 4  # of each arm every step, and the mean


def test_running_means_look_back_only() -> None:
    assert plots.running_mean([4.0, 2.0, 0.0]) == [4.0, 2.0, 0.0]
    long = [float(i) for i in range(40)]
    found = plots.running_mean(long)
    assert found[:4] == [0.0, 0.5, 1.0, 1.5]
    assert found[39] == (36 + 37 + 38 + 39) / 4


@pytest.mark.parametrize("layers", [1, 32])
def test_ranks_are_shown_by_the_names_of_layers(tmp_path: Path, layers: int) -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    draw = random.Random(0)
    history = [
        (
            step,
            {
                f"model.layers.{i}.{kind}": {"effective": 15 * draw.random(), "stable": 2.0}
                for i in range(layers)
                for kind in (*kinds, "a_projection_with_quite_a_long_name")
            },
        )
        for step in (10, 20)
    ]
    (written,) = check_all(lambda: plots.plot_ranks(history, 16, tmp_path / "r.png", TITLE))
    assert {*kinds, "effective rank", "stable rank", "r = 16"} <= set(written)


def rows(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    found: list[dict[str, Any]] = [
        {
            "title": f"method number {i}",
            "scores": [draw.uniform(0.7, 0.95) for _ in range(3)],
            "step_ratio": draw.uniform(1.0, 2.0),
        }
        for i in range(count)
    ]
    found[1] = {"title": "BitFit", "without": "does not apply: the model must have biases, got one"}
    found[2] = {"title": "prefix tuning", "without": f"failed: RuntimeError: {'because ' * 20}"}
    found[3]["scores"] = [math.nan, 0.8, math.inf]
    return found


@pytest.mark.parametrize("count", [5, 15])
def test_every_method_has_a_row_and_baselines_have_lines(tmp_path: Path, count: int) -> None:
    baselines = {"majority class": 0.5, "linear probe, frozen model": 0.83}
    path = tmp_path / "compare.png"
    (written,) = check_all(
        lambda: plots.plot_comparison(rows(count), "ROC AUC", path, TITLE, baselines=baselines)
    )
    for text in (
        "BitFit", "prefix tuning", "ROC AUC (higher is better)", "majority class: 0.500",
        "linear probe, frozen model: 0.830", "the score is not finite",
    ):  # fmt: skip
        assert text in written, text
    assert any(text.startswith("does not apply: the model") for text in written)
    assert any(text.startswith("failed: RuntimeError") for text in written)


def test_less_perplexity_is_better_and_a_wide_range_is_logarithmic(tmp_path: Path) -> None:
    found = [{"title": "LoRA", "scores": [4.0], "step_ratio": 1.2}]
    path = tmp_path / "compare.png"
    with kept_figures() as figures:
        baselines = {"before training": 495.0}
        plots.plot_comparison(found, "perplexity", path, TITLE, baselines=baselines)
        plots.plot_comparison(found, "perplexity", path, TITLE)
        assert [figure.axes[0].get_xscale() for figure in figures] == ["log", "linear"]
        assert figures[0].axes[0].get_xlabel() == "perplexity (lower is better)"
