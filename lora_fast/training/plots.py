"""The pictures of a run and of a comparison: no wider than a page, each told by its title."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from .effective_rank import Ranks

STOCK_COLOUR = "#b0413e"
OUR_COLOUR = "#1f5fa8"
GREY = "#777777"
WIDTH = 8.2  # inches: a page
TITLE_LETTERS, LABEL_LETTERS, REASON_LETTERS = 120, 24, 46
# Scores whose values may lie orders of magnitude apart, and those where less is better.
WIDE, LOWER_IS_BETTER = 10.0, ("loss", "perplexity")
LINE_STYLES = ("--", ":", "-.")


def plot_losses(
    curves: dict[str, list[float]], path: Path, title: str, *, best_step: int | None = None
) -> None:
    """Draw training loss over steps: each step faint, and on top of it the mean of the last steps.

    ``best_step`` is marked: the step whose weights are kept.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(WIDTH, 4.6), layout="constrained")
    beside = "stock" in curves and "lora_fast" in curves
    for arm, label, colour in (
        ("lora_fast", "lora_fast", OUR_COLOUR),
        ("stock", "stock PEFT", STOCK_COLOUR),
    ):
        if arm not in curves:
            continue
        losses, window = curves[arm], window_of(curves[arm])
        steps = range(1, len(losses) + 1)
        style: dict[str, Any] = {"linewidth": 1.8}
        if arm == "stock":
            style = {"linewidth": 1.5, "linestyle": "--"}
        elif beside:  # wide and light enough to be seen below the other one
            style = {"linewidth": 5.0, "alpha": 0.45}
        if window > 1:
            axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=0.8)
            label += f", mean of the last {window} steps"
        axes.plot(steps, running_mean(losses), color=colour, label=label, **style)
        if window > 1 and (arm == "stock" or not beside):
            axes.plot([], [], color=GREY, alpha=0.5, linewidth=0.8, label="each step")
    if best_step is not None:
        label = f"kept: step {best_step}"
        axes.axvline(best_step, color=GREY, linestyle=":", linewidth=1.2, label=label)
    axes.set(xlabel="optimizer step", ylabel="training loss (cross-entropy)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _tidy(axes)
    axes.legend(edgecolor="none", framealpha=0.9)
    _save(figure, path, title)


def plot_ranks(history: list[tuple[int, Ranks]], rank: int, path: Path, title: str) -> None:
    """Draw effective and stable rank: their means and ranges over steps, and at the end those of
    every layer, by the kind of layer."""
    plt = _pyplot()
    last, ranks = history[-1]
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in ranks))
    height = max(4.2, 1.6 + 0.42 * len(kinds))
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, height), layout="constrained")
    steps = [step for step, _ in history]
    for kind, colour, marker in (("effective", OUR_COLOUR, "o"), ("stable", STOCK_COLOUR, "D")):
        values = [[found[kind] for found in layers.values()] for _, layers in history]
        means = [sum(found) / len(found) for found in values]
        left.plot(steps, means, color=colour, marker=marker, markersize=3, label=f"{kind} rank")
        left.fill_between(
            steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15
        )
        for place, name in enumerate(kinds):
            found = [r[kind] for layer, r in ranks.items() if layer.rpartition(".")[2] == name]
            # From the first layer, at the top of its row, to the last one.
            rows = [place - 0.3 + 0.6 * (i + 0.5) / len(found) for i in range(len(found))]
            right.plot(found, rows, color=colour, marker=marker, markersize=3, linestyle="none")
    for axes, limit in ((left, "axhline"), (right, "axvline")):
        getattr(axes, limit)(rank, color=GREY, linestyle="--", linewidth=1, label=f"r = {rank}")
    left.set(xlabel="optimizer step", ylabel="rank of B A: mean over the layers, and range")
    left.set_ylim(bottom=0)
    left.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel=f"rank of B A at step {last}\n(one mark a layer, the first on top)")
    right.set_yticks(range(len(kinds)), [_short(name) for name in kinds])
    right.set_ylim(len(kinds) - 0.5, -0.5)
    right.set_xlim(left=0)
    for axes in (left, right):
        _tidy(axes)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    _save(figure, path, title)


def plot_comparison(
    rows: list[dict[str, Any]],
    score: str,
    path: Path,
    title: str,
    *,
    baselines: dict[str, float] | None = None,
) -> None:
    """Draw the score of every method with its spread, and its time per step.

    A row has ``title``, and ``scores`` (a list of values, one per seed) with ``step_ratio``, or
    ``without``: why it has no numbers. ``baselines`` are scores without training, by name.
    """
    plt = _pyplot()
    rows = rows[::-1]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 2.2 + 0.3 * len(rows)), sharey=True, layout="constrained"
    )
    drawn = [math.nan]
    for place, row in enumerate(rows):
        if "without" in row:
            _say(left, place, textwrap.shorten(row["without"], REASON_LETTERS, placeholder=" …"))
            continue
        finite = [value for value in row["scores"] if math.isfinite(value)]
        if len(finite) < len(row["scores"]):
            _say(left, place, "the score is not finite")
        if finite:
            mean = sum(finite) / len(finite)
            left.plot([min(finite), max(finite)], [place, place], color=OUR_COLOUR, linewidth=2)
            left.plot([mean], [place], color=OUR_COLOUR, marker="o")
            left.annotate(f"{mean:.3f}", (max(finite), place), (6, 0), **_NOTE)
            drawn += finite
        right.barh(place, row["step_ratio"], color=OUR_COLOUR, height=0.6)
        right.annotate(f"{row['step_ratio']:.2f}", (row["step_ratio"], place), (3, 0), **_NOTE)
    for number, (name, value) in enumerate((baselines or {}).items()):
        style = LINE_STYLES[number % len(LINE_STYLES)]
        label = f"{name}: {value:.3f}"
        left.axvline(value, color=GREY, linestyle=style, linewidth=1.2, label=label)
        drawn.append(value)
    positive = [value for value in drawn if value > 0]
    if score in LOWER_IS_BETTER and positive and max(positive) > WIDE * min(positive):
        left.set_xscale("log")
    left.margins(x=0.25)
    better = "lower" if score in LOWER_IS_BETTER else "higher"
    left.set(xlabel=f"{score} ({better} is better)", ylim=(-0.6, len(rows) - 0.4))
    left.set_yticks(range(len(rows)), [_short(row["title"]) for row in rows])
    right.axvline(1.0, color=GREY, linewidth=1)
    right.set(xlabel="time per step over the frozen model's\nforward and backward pass (line: 1)")
    right.margins(x=0.15)
    right.set_xlim(left=0)
    for axes in (left, right):
        _tidy(axes)
    if baselines:
        figure.legend(loc="outside lower center", ncols=len(baselines), fontsize=8)
    _save(figure, path, title)


# On white, so that a line behind does not cross it out.
_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
_NOTE: dict[str, Any] = {
    "textcoords": "offset points", "va": "center", "fontsize": 8, "color": "#333333",
    "bbox": _ON_WHITE,
}  # fmt: skip


def _say(axes: Any, place: int, text: str) -> None:
    """A row without numbers has words instead."""
    where = axes.get_yaxis_transform()
    style = {"va": "center", "fontsize": 7.5, "color": GREY, "bbox": _ON_WHITE}
    axes.text(0.02, place, text, transform=where, **style)


def window_of(values: list[float]) -> int:
    """How many steps the mean looks back: the last tenth of the curve, at most 20."""
    return max(1, min(20, len(values) // 10))


def running_mean(values: list[float]) -> list[float]:
    """The mean of the last tenth of the curve (at most 20 values) at every step."""
    window = window_of(values)
    means = []
    for end in range(1, len(values) + 1):
        chosen = values[max(0, end - window) : end]
        means.append(sum(chosen) / len(chosen))
    return means


def _short(name: str) -> str:
    """A name that leaves room for what is drawn: its end tells it from others."""
    return name if len(name) <= LABEL_LETTERS else f"…{name[1 - LABEL_LETTERS :]}"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path, title: str) -> None:
    lines = [textwrap.fill(line, TITLE_LETTERS) for line in title.splitlines()]
    figure.suptitle("\n".join(lines), fontsize=9)
    figure.savefig(path, dpi=150)
    _pyplot().close(figure)
