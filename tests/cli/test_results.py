"""The tables at the end of a run: numbers that stand beside each other belong together."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from lora_fast.cli.console import print_whole
from lora_fast.cli.results import cost_table, fused_line

ARM: dict[str, Any] = {
    "tokens_per_second": 1000.0, "step_seconds": 0.1, "saved_activation_bytes": 2**20,
}  # fmt: skip
FOUND: dict[str, Any] = {
    "trainable_parameters": 1000,
    "trainable_percent": 1.0,
    "results": {"stock": ARM, "lora_fast": {**ARM, "step_seconds": 0.06}},
    "comparison": {
        "forward_backward_seconds": {"stock": 0.202, "lora_fast": 0.2},
        "step_time_ratio": 0.896,
        "timed_pairs": 12,
        "saved_activation_ratio": 0.5,
    },
}


def shown(found: dict[str, Any]) -> dict[str, list[str]]:
    console = Console(width=200, highlight=False)
    with console.capture() as capture:
        print_whole(console, cost_table(found))
    rows = [line.strip().split("  ") for line in capture.get().splitlines()]
    return {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}


def test_the_ratio_beside_two_times_is_theirs() -> None:
    rows = shown(FOUND)
    assert rows["forward + backward, in turns"] == ["0.202 s", "0.200 s", "0.990"]
    assert rows["ratio of 12 pairs, median"] == ["0.896"]


def test_times_of_arms_that_ran_one_after_the_other_are_called_that() -> None:
    rows = shown(FOUND)
    assert rows["step time, one after the other"] == ["0.100 s", "0.060 s"]
    alone = {**FOUND, "results": {"lora_fast": ARM}}
    del alone["comparison"]
    assert shown(alone)["step time"] == ["0.100 s"]


def test_layers_that_peft_computes_are_told_of() -> None:
    fused = {
        "backend": "torch", "adapted_layers": 14, "fused_layers": 8, "fused_calls": 800,
        "fallback_calls": {}, "uncounted_layers": 6, "all_fused": False,
    }  # fmt: skip
    line = fused_line({"fused": fused})
    assert "8 of 14 adapted layers fused" in line
    assert line.endswith(
        "800 fused calls, 0 others; the 6 that stay PEFT's run its code at every step"
    )
    assert fused_line({"fused": {**fused, "uncounted_layers": 0}}).endswith("0 others")
