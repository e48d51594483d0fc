"""Pictures of a GPU day: decoder layers, linears, the two NF4 routes, measured against modelled.

Each is as wide as a page. Bars are horizontal, start at zero and have the names of their cases
beside them; a panel shows one kind of case, and the legend is below all panels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .modelled import Modelled
from .tables import Rows, best

WIDTH = 8.2  # inches
BAR, GAP, AROUND = 0.08, 0.1, 1.9
_COLOURS = {
    "frozen": "#7f7f7f",
    "bitsandbytes": "#b0b0b0",
    "peft": "#dd8452",
    "peft fp32": "#c44e52",
    "peft compiled": "#ccb974",
    "unsloth": "#8172b3",
    "lora_fast": "#4c72b0",
    "lora_fast fp32": "#64b5cd",
    "lora_fast fused": "#1f3f77",
    "lora_fast torch": "#55a868",
}
_ROUTES = {
    "dense W": "#7f7f7f",
    "workspace": "#4c72b0",
    "in the product": "#c44e52",
    "bitsandbytes": "#dd8452",
}
_DIRECTIONS = {"forward": "forward", "forward+backward": "forward + backward"}

Panels = dict[str, Rows]


def draw(results: dict[str, Any], modelled: Modelled, folder: Path) -> list[Path]:
    """A picture for each step that has something to draw."""
    import matplotlib

    matplotlib.use("Agg")
    steps = {name: step["rows"] for name, step in results["steps"].items()}
    layers = {**steps.get("layers", {}), **steps.get("shorter_layers", {})}
    linears = steps.get("linears", {})
    device = results["calls"][-1]["name"] if results["calls"] else "no device"
    note = f"{results['note']}\n" if results["note"] else ""
    routes = steps.get("crossover", {})
    drawings: list[tuple[str, str, Rows, Callable[[Rows], Any]]] = [
        ("layers", "Decoder layers", layers, lambda rows: _bars({"": rows}, modelled)),
        ("crossover", "NF4: decoded before or inside the product", routes, _routes),
        ("modelled", "Measured beside modelled", {**layers, **linears}, _scatter_of(modelled)),
    ]
    for weight, title in (("dense", "dense W"), ("nf4", "NF4")):
        rows = {unit: row for unit, row in linears.items() if unit.split()[0] == weight}
        name, title = f"linears-{weight}", f"One adapted linear, {title}"
        drawings.append((name, title, rows, lambda rows: _bars(_by_direction(rows), modelled)))
    found = []
    for name, title, rows, drawing in drawings:
        figure = drawing(rows) if rows else None
        if figure is not None:
            figure.suptitle(f"{note}{title}, bfloat16: {device}", fontsize=10)
            found.append(_saved(figure, folder / f"{name}.png"))
    return found


def _saved(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _by_direction(rows: Rows) -> Panels:
    """The linears by the direction with which the names of their units end."""
    panels: Panels = {}
    for unit, row in rows.items():
        _, *middle, direction = unit.split()
        case = " ".join(word for word in middle if word != "bfloat16")
        panels.setdefault(_DIRECTIONS.get(direction, direction), {})[case] = row
    return panels


def _grid(panels: Panels, heights: list[float]) -> tuple[Any, list[Any]]:
    """A figure with two panels a row, or one alone; a row is as high as its highest panel."""
    from matplotlib import pyplot as plt

    columns = min(2, len(panels))
    rows = [max(heights[i : i + columns]) for i in range(0, len(heights), columns)]
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(WIDTH, AROUND + sum(rows)), squeeze=False,
        layout="constrained", height_ratios=rows,
    )  # fmt: skip
    places = axes.ravel().tolist()
    for axis in places[len(panels) :]:
        axis.set_visible(False)
    return figure, places[: len(panels)]


def _bars(panels: Panels, modelled: Modelled) -> Any:
    """Time over the floor with quartiles; a black mark where it was modelled."""
    contests = {kind: [_drawn(row) for row in rows.values()] for kind, rows in panels.items()}
    names = [n for n in _COLOURS if any(n in drawn for c in contests.values() for drawn in c)]
    most = max(len(drawn) for contest in contests.values() for drawn in contest)
    case = BAR * most + GAP
    figure, axes = _grid(panels, [0.5 + case * len(rows) for rows in panels.values()])
    for axis, (kind, rows) in zip(axes, panels.items(), strict=True):
        for place, (row, drawn) in enumerate(zip(rows.values(), contests[kind], strict=True)):
            for number, who in enumerate(drawn):
                y = place + (number - (len(drawn) - 1) / 2) * BAR / case
                _bar(axis, y, BAR / case, row, who, modelled)
        axis.axvline(1.0, color="black", linewidth=0.7, linestyle=":")
        axis.set_yticks(range(len(rows)), list(rows), fontsize=7)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlim(left=0)
        axis.set_title(kind, fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_xlabel("time over the frozen layer; whiskers: quartiles", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    _legend(figure, names, _COLOURS)
    return figure


def _drawn(row: dict[str, Any]) -> list[str]:
    """The contestants that have bars: not the floor, which is 1 by definition."""
    return [who for who in _COLOURS if who in row["contestants"] and who != row["baseline"]]


def _bar(axis: Any, y: float, height: float, row: dict[str, Any], who: str, by: Modelled) -> None:
    ratio = (best(row["contestants"][who]) or {}).get("over_baseline")
    if ratio is None:
        axis.text(0.02, y, "failed", va="center", fontsize=5, color=_COLOURS[who])
        return
    spread = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
    axis.barh(
        y, ratio["median"], height, color=_COLOURS[who],
        xerr=spread, error_kw={"ecolor": "#333333", "elinewidth": 0.6},
    )  # fmt: skip
    expected = by.over_floor(row, who)
    if expected is not None:
        axis.plot([expected] * 2, [y - height / 2, y + height / 2], color="black", linewidth=1.5)


def _legend(figure: Any, names: list[str], colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=colours[name], label=name) for name in names]
    handles.append(Line2D([], [], color="black", linewidth=1.5, label="modelled"))
    handles.append(
        Line2D([], [], color="black", linewidth=0.7, linestyle=":", label="the floor: 1")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8)


def _routes(rows: Rows) -> Any:
    """Time of each route over the number of rows, a panel for each size and direction."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plain = FuncFormatter(lambda value, _: f"{value:g}")
    panels: Panels = {}
    for unit, row in rows.items():
        kind = f"{_DIRECTIONS.get(row['direction'], row['direction'])}, {row['K']} → {row['N']}"
        panels.setdefault(kind, {})[unit] = row
    figure, axes = _grid(panels, [2.6] * len(panels))
    for axis, (kind, found) in zip(axes, panels.items(), strict=True):
        for who, colour in _ROUTES.items():
            times = [(row["M"], best(row["contestants"].get(who, {}))) for row in found.values()]
            points = sorted((M, t["seconds"]["median"] * 1e3) for M, t in times if t is not None)
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=who)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(plain)
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(plain)
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(kind, fontsize=9)
        axis.set_xlabel("rows of x", fontsize=8)
        axis.set_ylabel("ms (logarithmic)", fontsize=8)
        axis.tick_params(labelsize=8, which="both")
        axis.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _scatter_of(modelled: Modelled) -> Callable[[Rows], Any]:
    def scatter(rows: Rows) -> Any:
        """None where nothing was modelled of what was measured."""
        from matplotlib import pyplot as plt

        found: dict[str, list[tuple[float, float]]] = {}
        for row in rows.values():
            for who in ("peft", "peft fp32", "unsloth", "lora_fast fused"):
                ratio = (best(row["contestants"].get(who, {})) or {}).get("over_baseline")
                expected = modelled.over_floor(row, who)
                if ratio is not None and expected is not None:
                    found.setdefault(who, []).append((expected, ratio["median"]))
        if not found:
            return None
        figure, axis = plt.subplots(figsize=(6.5, 6.5), layout="constrained")
        for who, points in found.items():
            axis.scatter(*zip(*points, strict=True), label=who, color=_COLOURS[who], s=14)
        end = 1.1 * max(value for points in found.values() for point in points for value in point)
        axis.plot([0, end], [0, end], color="black", linewidth=0.8, label="as modelled")
        axis.set(xlim=(0, end), ylim=(0, end), aspect="equal")
        axis.set_xlabel("modelled time over the frozen layer (linears alone)")
        axis.set_ylabel("measured time over the frozen layer")
        axis.legend(fontsize=8, loc="upper left")
        return figure

    return scatter
