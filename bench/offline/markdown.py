"""Markdown tables, that of the kernels' machine code, and the band of a modelled time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_CLASSES = ("mma", "tensor_memory", "shared", "global", "convert", "float", "shuffle", "integer")


def kernel_table(rows: list[dict[str, Any]]) -> str:
    """The machine code of each kernel, one per line."""
    lines = []
    for row in rows:
        loop = {} if row["main_loop"] is None else row["loops"][row["main_loop"]]
        lines.append(
            (
                row["kernel"],
                row["config"],
                str(row["registers"]),
                str(row["spilled_bytes"]),
                f"{row['shared_bytes'] / 1024:.0f}",
                str(row["ctas_per_sm"]),
                " ".join(row["mma"]) or "-",
                str(row["instructions"]),
                str(sum(loop.values())) if loop else "-",
                *(str(loop.get(name, 0)) if loop else "-" for name in _CLASSES),
                str(sum(n for name, n in loop.items() if name not in _CLASSES)) if loop else "-",
                *(_shown(row.get(name)) for name in _CYCLES),
            )
        )
    head = (
        *("kernel", "tiles, warps, stages", "registers", "spilled B", "shared KiB", "CTAs/SM"),
        *("MMA", "instructions", "in main loop", *_CLASSES, "other"),
        *("issue cycles", "tensor cycles", "TB/s by issue"),
    )
    return table(head, lines)


_CYCLES = ("issue_cycles", "tensor_cycles", "issue_terabytes")


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


def band_of(row: dict[str, Any], device: str, *, digits: int) -> str:
    """The modelled time at e = 1 and, where it depends on e, at the lowest e that was modelled."""
    times = [row[name].get(device) for name in ("over_frozen", "over_frozen_slow")]
    shown = [f"{time:.{digits}f}" for time in times if time is not None]
    return " – ".join(dict.fromkeys(shown)) or "-"


def table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table, its columns aligned."""
    cells = [head, *lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    cells.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    )
