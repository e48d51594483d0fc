"""The counted numbers as pictures: bars of extra bytes and modelled time, and a roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .contestants import LoraFast, stock
from .counting import MAIN
from .operations import Operation
from .rooflines import ATTAINED_BYTES, ATTAINED_FLOPS, BY_ARCH, ROOFLINES
from .tables import LAYER, LINEAR

_COLOURS = {
    "peft fp32": "#c44e52",
    "peft": "#dd8452",
    "unsloth": "#8172b3",
    "lorafusion": "#937860",
    "lora_fast": "#4c72b0",
}


def draw(counts: list[dict[str, Any]], folder: Path) -> list[Path]:
    """bars.png and roofline.png in ``folder``. ImportError: matplotlib is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    return [_bars(counts, folder / "bars.png"), _roofline(folder / "roofline.png")]


def _bars(counts: list[dict[str, Any]], path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for column, layer in enumerate((LINEAR, LAYER)):
        rows = [
            row
            for row in counts
            if (row["layer"], row["M"], row["R"], row["weight"], row["p"])
            == (layer, 8192, 16, "dense", 0.0)
        ]
        _time_bars(axes[0][column], rows)
        _byte_bars(axes[1][column], rows)
        axes[0][column].set_title(f"{layer}, M = 8192, r = 16, bfloat16, p = 0", fontsize=9)
    axes[0][0].set_ylabel("modelled time over frozen")
    axes[1][0].set_ylabel("GB moved beyond frozen (counted)")
    figure.suptitle("Forward + backward; counted and modelled, not measured", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _time_bars(axis: Any, rows: list[dict[str, Any]]) -> None:
    for number, (who, colour) in enumerate(_COLOURS.items()):
        times = {n: t for r in rows if r["who"] == who for n, t in r["over_frozen"].items()}
        heights = [times.get(roofline.name, 1.0) - 1.0 for roofline in ROOFLINES]
        places = [i + 0.16 * (number - 2) for i in range(len(ROOFLINES))]
        axis.bar(places, heights, 0.15, bottom=1.0, label=who, color=colour)
    axis.set_xticks(range(len(ROOFLINES)), [roofline.name for roofline in ROOFLINES])
    axis.legend(fontsize=8)


def _byte_bars(axis: Any, rows: list[dict[str, Any]]) -> None:
    for who, colour in _COLOURS.items():
        found = [r for r in rows if r["who"] == who and r["arch"] in (None, 90)]
        if not found:
            continue
        extra = found[0]["extra_bytes"] / 1e9
        launches = found[0]["launches_forward"] + found[0]["launches_backward"]
        bar = axis.bar([who], [extra], color=colour)
        axis.bar_label(bar, [f"{extra:.2f} GB\n{launches} launches"], fontsize=8)
    axis.margins(y=0.2)


def _roofline(path: Path) -> Path:
    """Every operation of the main case on the H100's roof: how much of its time is memory."""
    from matplotlib import pyplot as plt

    h100 = BY_ARCH[90]
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    intensities = [2.0**e for e in range(-3, 13)]
    roof = [_attained(i, h100.flops, h100.bytes) for i in intensities]
    axis.loglog(intensities, roof, color="black", linewidth=1, label="attainable")
    step, _ = LoraFast(MAIN).step(MAIN, 90)
    steps = {"peft": stock(MAIN, "peft").operations, "lora_fast": step.operations}
    for who, operations in steps.items():
        _points(axis, who, operations)
    axis.set_xlabel("FLOP per byte of memory traffic (counted)")
    axis.set_ylabel("FLOP/s (modelled, H100)")
    axis.set_title(f"{MAIN}: area is modelled time", fontsize=10)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _points(axis: Any, who: str, operations: list[Operation]) -> None:
    h100 = BY_ARCH[90]
    points = [op for op in operations if op.flops and op.bytes]
    intensity = [op.flops / op.bytes for op in points]
    height = [_attained(i, h100.flops, h100.bytes) for i in intensity]
    area = [h100.seconds(op) * 1e6 for op in points]
    idle = sum(h100.seconds(op) for op in operations if not op.flops)
    label = f"{who} (and {idle * 1e6:.0f} µs in operations without products)"
    axis.scatter(intensity, height, s=area, alpha=0.5, color=_COLOURS[who], label=label)


def _attained(intensity: float, flops: float, moved: float) -> float:
    return min(flops * ATTAINED_FLOPS, intensity * moved * ATTAINED_BYTES)
