"""The counted steps of blocks of experts as a picture and as a table of docs/results.md."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .expert_graphs import MODELS

TOKENS = 8192
WIDTH = 8.2  # inches: a page
_COLOURS = {
    "peft": "#dd8452",
    "unsloth": "#8172b3",
    "axolotl": "#937860",
    "lora_fast": "#4c72b0",
}
_BAR = 0.19
Rows = list[dict[str, Any]]


def draw(rows: Rows, path: Path) -> Path:
    """Bytes moved and saved of each block with 8192 tokens. ImportError: no matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(WIDTH, 6.4), layout="constrained", sharex=True)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    _bars(axes[0], rows, layers, "bytes")
    axes[0].axhline(1.0, color="#333333", linewidth=0.8)
    axes[0].set(ylabel="bytes read and written,\nover the frozen block's")
    _bars(axes[1], rows, layers, "saved")
    axes[1].set(ylabel="bytes saved for backward,\nover lora_fast's")
    axes[1].set_xticks(range(len(layers)), layers)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(
        f"LoRA on a block of experts: forward + backward, bfloat16, {TOKENS} tokens, r = 16\n"
        "counted, not measured",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _bars(axis: Any, rows: Rows, layers: list[str], what: str) -> None:
    unit = "frozen" if what == "bytes" else "lora_fast"
    for number, (who, colour) in enumerate(_COLOURS.items()):
        values = [_of(rows, n, who)[what] / _of(rows, n, unit)[what] for n in layers]
        places = [i + _BAR * (number - 1.5) for i in range(len(layers))]
        drawn = axis.bar(places, values, _BAR, color=colour, label=title(who))
        axis.bar_label(drawn, [f"{v:.2g}" for v in values], fontsize=7, padding=1)


def markdown(rows: Rows) -> str:
    """The rows with 8192 tokens, as a table."""
    lines = [
        "| | | launches | read and written | saved beside x | largest result over W |",
        "|---|---|---|---|---|---|",
    ]
    layer = None
    for row in _with(rows, TOKENS):
        name = "" if row["layer"] == layer else row["layer"]
        layer = row["layer"]
        lines.append(
            f"| {name} | {title(row['contestant'])} | {row['launches']} | "
            f"{row['bytes'] / 1e9:.1f} GB | {row['saved'] / 1e6:.0f} MB | "
            f"{row['largest'] / row['weight']:.2f} |"
        )
    return "\n".join(lines)


def title(who: str) -> str:
    return f"{who} (model)" if who in MODELS else {"peft": "PEFT"}.get(who, who)


def _of(rows: Rows, layer: str, who: str) -> dict[str, Any]:
    found = (r for r in _with(rows, TOKENS) if (r["layer"], r["contestant"]) == (layer, who))
    return next(found)


def _with(rows: Rows, tokens: int) -> Iterable[dict[str, Any]]:
    return (row for row in rows if row["M"] == tokens)
