"""The counted numbers as pictures: bars of traffic and modelled time, and a roofline."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lora_fast.tuning.rooflines import BY_ARCH, ROOFLINES

from .contestants import LoraFast, stock
from .counting import MAIN, MODELLED
from .operations import Operation
from .tables import LAYER, LINEAR

WIDTH = 8.2  # inches: a page
_COLOURS = {
    "peft fp32": "#c44e52",
    "peft": "#dd8452",
    "unsloth": "#8172b3",
    "lorafusion": "#937860",
    "lora_fast fused": "#8fb1e0",
    "lora_fast": "#4c72b0",
}
_BAR = 0.135

Rows = list[dict[str, Any]]


def draw(counts: Rows, folder: Path) -> list[Path]:
    """bars.png and roofline.png in ``folder``.

    ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    return [_bars(counts, folder / "bars.png"), _roofline(folder / "roofline.png")]


def _bars(counts: Rows, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, 2, figsize=(WIDTH, 7.4), layout="constrained", height_ratios=(1.6, 1)
    )
    for column, layer in enumerate((LINEAR, LAYER)):
        rows = [
            row
            for row in counts
            if (row["layer"], row["M"], row["R"], row["weight"], row["p"])
            == (layer, 8192, 16, "dense", 0.0)
        ]
        _time_bars(axes[0][column], rows)
        _byte_bars(axes[1][column], rows)
        axes[0][column].set_title(layer, fontsize=10)
        for axis in axes[:, column]:
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(
        "Forward + backward, bfloat16, 8192 tokens, r = 16, no dropout\n"
        "counted and modelled, not measured; whiskers: Triton's products at 1 … 0.85 of cuBLAS",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _title(who: str) -> str:
    return f"{who} (model)" if who in MODELLED else who


def _time_bars(axis: Any, rows: Rows) -> None:
    """Bars from 0; the frozen layer is the line at 1."""
    for number, (who, colour) in enumerate(_COLOURS.items()):
        times = {n: t for r in rows if r["who"] == who for n, t in r["over_frozen"].items()}
        found = [(i, r.name) for i, r in enumerate(ROOFLINES) if r.name in times]
        places = [i + _BAR * (number - 2.5) for i, _ in found]
        lengths = [times[name] for _, name in found]
        slow = {n: t for r in rows if r["who"] == who for n, t in r["over_frozen_slow"].items()}
        more = [max(0.0, slow[name] - times[name]) for _, name in found]
        axis.barh(places, lengths, 0.93 * _BAR, label=_title(who), color=colour)
        if any(more):
            axis.errorbar(
                lengths, places, xerr=[[0.0] * len(more), more], fmt="none", ecolor="black",
                elinewidth=0.9, capsize=2,
            )  # fmt: skip
    axis.axvline(1.0, color="black", linewidth=0.9, label="frozen layer")
    axis.set_yticks(range(len(ROOFLINES)), [roofline.name for roofline in ROOFLINES])
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("modelled time over the frozen layer", fontsize=9)


def _byte_bars(axis: Any, rows: Rows) -> None:
    shown = []
    for who, colour in _COLOURS.items():
        found = [r for r in rows if r["who"] == who and r["arch"] in (None, 90)]
        if not found:
            continue
        extra = found[0]["extra_bytes"] / 1e9
        launches = found[0]["launches_forward"] + found[0]["launches_backward"]
        bar = axis.barh(len(shown), extra, 0.7, color=colour)
        axis.bar_label(bar, [f" {extra:.2f} GB, {launches} launches"], fontsize=8)
        shown.append(_title(who))
    axis.set_yticks(range(len(shown)), shown)
    axis.invert_yaxis()
    axis.margins(x=0.75)
    axis.set_xlim(left=0)
    axis.set_xlabel("HBM traffic over frozen, GB (counted)", fontsize=9)


def _roofline(path: Path) -> Path:
    """Every operation of the main case: where it stands under the H100's roof, and its time."""
    from matplotlib import pyplot as plt

    step, _ = LoraFast(MAIN).step(MAIN, 90)
    steps = {"peft": stock(MAIN, "peft").operations, "lora_fast": step.operations}
    count = sum(len(operations) for operations in steps.values())
    figure, (roof, times) = plt.subplots(
        1, 2, figsize=(WIDTH, 1.8 + 0.21 * count), layout="constrained"
    )
    _roof(roof, steps)
    _times(times, steps)
    for axis in (roof, times):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.legend(*roof.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(
        f"{MAIN.shape.name}, {MAIN.M} tokens, r = {MAIN.R}, bfloat16, forward + backward, on an "
        "H100\ncounted and modelled, not measured",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _roof(axis: Any, steps: dict[str, list[Operation]]) -> None:
    h100 = BY_ARCH[90]
    rates = h100.flops * h100.attained_flops, h100.copied
    intensities = [2.0 ** (e / 8) for e in range(16, 97)]
    roof = [_attained(i, *rates) for i in intensities]
    axis.loglog(intensities, roof, color="black", linewidth=1, label="attainable")
    for (who, operations), marker in zip(steps.items(), ("s", "o"), strict=True):
        points = Counter(
            round(op.flops / op.bytes, 1) for op in operations if op.flops and op.bytes
        )
        heights = [_attained(i, *rates) for i in points]
        style = {"s": 60, "facecolor": "none", "linewidth": 1.5}
        axis.scatter(
            list(points), heights, marker=marker, edgecolor=_COLOURS[who], label=who, **style
        )
        for (intensity, number), height in zip(points.items(), heights, strict=True):
            if number > 1:
                axis.annotate(
                    f"{number} of {who}'s", (intensity, height), (8, -9 if marker == "s" else -19),
                    textcoords="offset points", fontsize=8, color=_COLOURS[who],
                )  # fmt: skip
    axis.set_xlabel("FLOP per byte of HBM traffic (counted)", fontsize=9)
    axis.set_ylabel("FLOP/s (modelled)", fontsize=9)
    axis.grid(alpha=0.25)


def _times(axis: Any, steps: dict[str, list[Operation]]) -> None:
    """A bar for each operation, in the order of the step; ours below."""
    h100, names = BY_ARCH[90], []
    for who, operations in steps.items():
        total = sum(map(h100.seconds, operations)) * 1e6
        for number, op in enumerate(operations):
            took = h100.seconds(op) * 1e6
            bar = axis.barh(len(names), took, 0.75, color=_COLOURS[who])
            last = (
                f"; all {len(operations)}: {total:.0f} µs" if number == len(operations) - 1 else ""
            )
            axis.bar_label(bar, [f" {took:.0f}{last}"], fontsize=7)
            names.append(op.name.removeprefix("aten::").partition(".")[0])
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.set_xlim(left=0)
    axis.set_xlabel("modelled time of each operation, µs", fontsize=9)


def _attained(intensity: float, flops: float, moved: float) -> float:
    return min(flops, intensity * moved)
