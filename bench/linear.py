"""How much an adapted linear costs beyond the frozen layer: ratios of paired measurements.

python -m bench.linear [--device cuda] [--rounds 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .instruments.device_label import default_device, label, steady
from .instruments.paired import measure
from .linear_cases import DIRECTIONS, Case, Layer, build, cases, fused_calls


def run_case(case: Case, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """One row per direction: ratios to the frozen layer, lora_fast to PEFT, saved bytes."""
    layers = build(case, device)
    rows = []
    for direction in DIRECTIONS:
        steps = {name: layer.step(direction) for name, layer in layers.items()}
        timings = measure(steps, rounds=rounds, device=device)
        rows.append(
            {
                "case": str(case),
                "direction": direction,
                "over_frozen": {
                    name: asdict(timings.ratio(name, "frozen"))
                    for name in steps
                    if name != "frozen"
                },
                "lora_fast_over_peft": asdict(timings.ratio("lora_fast", "peft")),
                "saved_over_x": _saved_over_x(layers),
                "median_seconds": {name: timings.median(name) for name in steps},
            }
        )
    if fused_calls(layers["lora_fast"]) == 0:
        raise RuntimeError(f"{case}: the fused path never ran, so nothing was measured")
    return rows


def _saved_over_x(layers: dict[str, Layer]) -> dict[str, float]:
    x = layers["frozen"].x
    return {name: layer.saved_bytes() / x.nbytes for name, layer in layers.items()}


def format_rows(rows: list[dict[str, Any]]) -> str:
    """A table of medians, with quartiles as a measure of their spread."""
    columns = ("bitsandbytes", "peft", "lora_fast")
    last_titles = ("lora_fast/peft (quartiles)", "peft saves", "lora_fast saves")
    table = [("layer", "direction", *columns, *last_titles)]
    for row in rows:
        over, last = row["over_frozen"], row["lora_fast_over_peft"]
        saved = row["saved_over_x"]
        table.append(
            (
                row["case"],
                row["direction"],
                *(f"{over[c]['median']:.2f}" if c in over else "-" for c in columns),
                f"{last['median']:.2f} ({last['low']:.2f}-{last['high']:.2f})",
                f"{saved['peft']:.2f}",
                f"{saved['lora_fast']:.2f}",
            )
        )
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in table
    ]
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    steady(options.device)
    print(f"{label(options.device)}, median of {options.rounds} interleaved rounds", flush=True)
    rows = [
        row
        for case in cases(options.device)
        for row in run_case(case, options.device, options.rounds)
    ]
    print(
        "Times over those of a frozen nn.Linear; saved for backward beyond x, over the bytes of x."
    )
    print(format_rows(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
