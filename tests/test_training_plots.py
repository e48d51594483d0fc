"""The pictures: what they draw, and that they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lora_fast.training import plots


def lines_of(curves: dict[str, list[float]], path: Path) -> dict[str, Any]:
    """Draw the plot and return the lines with a label, by label."""
    kept: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt, "close", kept.append)
        plots.plot_losses(curves, path)
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
    assert plots.running_mean([4.0, 2.0, 0.0]) == [4.0, 2.0, 0.0]
    long = [float(i) for i in range(40)]
    found = plots.running_mean(long)
    assert found[:4] == [0.0, 0.5, 1.0, 1.5]
    assert found[39] == (36 + 37 + 38 + 39) / 4
