"""A block of experts with LoRA: time over stock PEFT's on a CPU, launches and bytes counted.

    python -m bench.experts [--rounds 15] [--threads 1] [--out FOLDER]

On a CPU 64 experts, of which each of 1024 tokens takes 8, hidden size 512, inner size 256, r 16,
float32, forward and backward. Counted are the operations of the layers in LAYERS in bfloat16 on
fake tensors: each that is not a view as one launch, which reads its arguments and writes its
results once. Contestants: the frozen block and PEFT's wrappers around it with transformers'
grouped_mm, models of Unsloth's and Axolotl's graphs, and lora_fast in PyTorch's operations and in
kernels, compiled for sm_90 and recorded in place of launched.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .expert_blocks import LAYERS, ROWS, SMALL, build, check_fused, step_of
from .expert_counts import CONTESTANTS, counts
from .expert_plots import draw, markdown
from .instruments import paired
from .instruments.device_label import label

# The most time over PEFT's, and over the frozen block's.
MOST = {"peft": 0.60, "frozen": 1.30}


def ratios(rounds: int) -> dict[str, Any]:
    """Times of lora_fast over the others' on this CPU."""
    models = build(SMALL, torch.float32)
    dY = torch.randn(1024, SMALL.H, generator=torch.Generator().manual_seed(2))
    steps: dict[str, paired.Step] = {}
    for name, model in models.items():
        forward, _ = step_of(model, SMALL, 1024, torch.float32)
        steps[name] = lambda forward=forward: forward().backward(dY)  # type: ignore[misc]
    timings = paired.measure(steps, rounds=rounds, device=torch.device("cpu"))
    check_fused(models["lora_fast"])
    return {name: asdict(timings.ratio("lora_fast", name)) for name in ("peft", "frozen")}


def text(row: dict[str, Any]) -> str:
    return (
        f"{row['layer']:14}  {row['M']:5}  {row['contestant']:15}  {row['launches']:8}  "
        f"{row['bytes'] / 1e9:7.2f}  {row['saved'] / 1e6:8.1f}  "
        f"{row['largest'] / row['weight']:8.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="0: count alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a folder for counts.json, table and picture")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.rounds:
        _show_ratios(options.rounds)
    print("Counted, forward and backward: launches, GB read and written, MB saved beside x, and")
    print("the largest result in units of the experts' first weight, E × N × K elements.")
    print("layer               M  contestant       launches       GB  saved MB   largest")
    rows = []
    for block in LAYERS:
        for tokens in ROWS:
            for contestant in CONTESTANTS:
                rows.append(counts(block, tokens, contestant))
                print(text(rows[-1]), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "counts.json").write_text(json.dumps(rows, indent=1) + "\n")
        (options.out / "table.md").write_text(markdown(rows) + "\n")
        draw(rows, options.out / "experts.png")


def _show_ratios(rounds: int) -> None:
    print(f"{label(torch.device('cpu'))}, median of {rounds} interleaved rounds", flush=True)
    for name, ratio in ratios(rounds).items():
        found, most = paired.Ratio(**ratio), MOST[name]
        print(f"lora_fast over {name:7} {found}, at most {most:.2f}", end="")
        print("\n" if found.median <= most else "  NOT\n")


if __name__ == "__main__":
    main()
