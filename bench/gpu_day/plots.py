"""Pictures of a GPU day: decoder layers, linears, the two NF4 routes, measured against modelled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .modelled import Modelled
from .tables import Rows, best

_COLOURS = {
    "frozen": "#7f7f7f",
    "bitsandbytes": "#8c8c8c",
    "peft": "#dd8452",
    "peft fp32": "#c44e52",
    "peft compiled": "#ccb974",
    "unsloth": "#8172b3",
    "lora_fast": "#4c72b0",
    "lora_fast fp32": "#64b5cd",
    "lora_fast fused": "#1f3f77",
    "lora_fast torch": "#55a868",
}


def draw(results: dict[str, Any], modelled: Modelled, folder: Path) -> list[Path]:
    """A picture for each step that has rows to draw."""
    import matplotlib

    matplotlib.use("Agg")
    steps = {name: step["rows"] for name, step in results["steps"].items()}
    layers = {**steps.get("layers", {}), **steps.get("shorter_layers", {})}
    drawings: tuple[tuple[str, Rows, Callable[[Any, Rows], None]], ...] = (
        ("layers", layers, lambda axis, rows: _bars(axis, rows, modelled)),
        ("linears", steps.get("linears", {}), lambda axis, rows: _bars(axis, rows, modelled)),
        ("crossover", steps.get("crossover", {}), _routes),
        ("modelled", {**layers, **steps.get("linears", {})}, _scatter_of(modelled)),
    )
    title = results["calls"][-1]["name"] if results["calls"] else ""
    if results["note"]:
        title = f"{results['note']}\n{title}"
    return [
        _drawn(folder / f"{name}.png", rows, drawing, title)
        for name, rows, drawing in drawings
        if rows
    ]


def _drawn(path: Path, rows: Rows, drawing: Callable[[Any, Rows], None], title: str) -> Path:
    from matplotlib import pyplot as plt

    wide = min(40.0, max(9.0, 0.55 * len(rows)))
    figure, axis = plt.subplots(figsize=(wide, 5.5), layout="constrained")
    drawing(axis, rows)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _bars(axis: Any, rows: Rows, modelled: Modelled) -> None:
    """Time over the floor with quartiles; a black line where it was modelled."""
    names = [n for n in _COLOURS if any(n in row["contestants"] for row in rows.values())]
    width = 0.8 / max(1, len(names))
    for number, who in enumerate(names):
        for place, row in enumerate(rows.values()):
            ratio = (best(row["contestants"].get(who, {})) or {}).get("over_baseline")
            if ratio is None:
                continue
            x = place + width * (number - (len(names) - 1) / 2)
            spread = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
            axis.bar(x, ratio["median"], width, color=_COLOURS[who], yerr=spread, ecolor="#333333")
            if (expected := modelled.over_floor(row, who)) is not None:
                axis.plot([x - width / 2, x + width / 2], [expected] * 2, color="black")
        axis.bar(0, 0, width, color=_COLOURS[who], label=who)
    axis.set_xticks(range(len(rows)), list(rows), rotation=90, fontsize=7)
    axis.set_ylabel("time over the frozen layer (line: modelled)")
    axis.set_ylim(bottom=0.8)
    axis.legend(fontsize=8)


def _routes(axis: Any, rows: Rows) -> None:
    """Time of each route over the number of rows."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows.values():
        for who, found in row["contestants"].items():
            times = best(found)
            if times is not None:
                name = f"{who}, {row['direction']}, N {row['N']}"
                lines.setdefault(name, []).append((row["M"], times["seconds"]["median"]))
    for name, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("rows")
    axis.set_ylabel("seconds")
    axis.legend(fontsize=6)


def _scatter_of(modelled: Modelled) -> Callable[[Any, Rows], None]:
    def scatter(axis: Any, rows: Rows) -> None:
        for who in ("peft", "peft fp32", "unsloth", "lora_fast fused"):
            points = []
            for row in rows.values():
                ratio = (best(row["contestants"].get(who, {})) or {}).get("over_baseline")
                expected = modelled.over_floor(row, who)
                if ratio is not None and expected is not None:
                    points.append((expected, ratio["median"]))
            if points:
                axis.scatter(*zip(*points, strict=True), label=who, color=_COLOURS[who], s=14)
        low, high = axis.get_xlim()
        axis.plot([low, high], [low, high], color="black", linewidth=0.8)
        axis.set_xlabel("modelled time over the frozen layer (linears alone)")
        axis.set_ylabel("measured time over the frozen layer")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)

    return scatter
