"""The pictures of a run and of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .effective_rank import Ranks

STOCK_COLOUR = "#b0413e"
OUR_COLOUR = "#1f5fa8"
GREY = "#777777"


def plot_losses(
    curves: dict[str, list[float]], path: Path, *, best_step: int | None = None
) -> None:
    """Draw training loss over steps: each step faint, a running mean on top of it.

    ``best_step`` is marked: the step whose weights are saved.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if "lora_fast" in curves:
        losses = curves["lora_fast"]
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=OUR_COLOUR, alpha=0.25, linewidth=1)
        # Wide and light, so that it shows below the other curve.
        width, alpha = (5.0, 0.45) if "stock" in curves else (1.8, 1.0)
        means = running_mean(losses)
        axes.plot(steps, means, OUR_COLOUR, linewidth=width, alpha=alpha, label="lora_fast")
    if "stock" in curves:
        losses = running_mean(curves["stock"])
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=STOCK_COLOUR, linestyle="--", label="stock PEFT")
    if best_step is not None:
        label = f"kept: step {best_step}"
        axes.axvline(best_step, color=GREY, linestyle=":", linewidth=1.2, label=label)
    axes.set(xlabel="optimizer step", ylabel="training loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _tidy(axes)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_ranks(history: list[tuple[int, Ranks]], rank: int, path: Path) -> None:
    """Draw effective and stable rank: their means and ranges over steps, and layer by layer."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps = [step for step, _ in history]
    for kind, colour in (("effective", OUR_COLOUR), ("stable", STOCK_COLOUR)):
        values = [[found[kind] for found in ranks.values()] for _, ranks in history]
        means = [sum(found) / len(found) for found in values]
        left.plot(steps, means, color=colour, marker="o", markersize=3, label=f"{kind} rank")
        left.fill_between(
            steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15
        )
        right.plot(values[-1], color=colour, marker="o", markersize=4, linestyle="none")
    left.axhline(rank, color=GREY, linestyle="--", linewidth=1, label=f"r = {rank}")
    left.set(xlabel="optimizer step", ylabel="rank of B A (mean and range over layers)")
    left.set_ylim(bottom=0)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False)
    right.set(xlabel="layer, in the order of the model", ylabel=f"rank of B A at step {steps[-1]}")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        _tidy(axes)
    _save(figure, path)


def plot_comparison(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the score of every method, by ``title``, with its spread, and its time per step.

    A row has ``title``, ``scores`` (a list of values, one a seed) and ``step_ratio``.
    """
    plt = _pyplot()
    rows = rows[::-1]
    height = 1.2 + 0.34 * len(rows)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, height), sharey=True, layout="constrained"
    )
    places = range(len(rows))
    for place, row in zip(places, rows, strict=True):
        values = row["scores"]
        mean = sum(values) / len(values)
        left.plot([min(values), max(values)], [place, place], color=OUR_COLOUR, linewidth=2)
        left.plot([mean], [place], color=OUR_COLOUR, marker="o")
    left.set(xlabel=title)
    left.set_yticks(list(places), [row["title"] for row in rows])
    ratios = [row["step_ratio"] for row in rows]
    right.barh(list(places), ratios, color=OUR_COLOUR, height=0.6)
    right.axvline(1.0, color=GREY, linestyle="--", linewidth=1)
    right.set(xlabel="time per step / forward and backward of the frozen model")
    for axes in (left, right):
        _tidy(axes)
    _save(figure, path)


def running_mean(values: list[float]) -> list[float]:
    """Return the mean of the last tenth of the curve (at most 20 values) at every step."""
    window = max(1, min(20, len(values) // 10))
    means = []
    for end in range(1, len(values) + 1):
        chosen = values[max(0, end - window) : end]
        means.append(sum(chosen) / len(chosen))
    return means


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
    _pyplot().close(figure)
