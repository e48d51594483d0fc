"""Comparison of two runs that must be equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_runs import (
    metrics_of,
)

from lora_fast.training.checkpoints import latest_checkpoint, stored_state


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


TIMES = {"step_seconds", "tokens_per_second", "step_time_ratio", "forward_backward_seconds"}


def assert_same_run(first: Path, second: Path) -> None:
    """The same adapter, curves, scores and counts; times differ, but of no step is it unknown."""
    ours, theirs = adapter(first), adapter(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert without_times(metrics_of(first)) == without_times(metrics_of(second))
    assert (first / "layers.txt").read_text() == (second / "layers.txt").read_text()
    for out in (first, second):
        for arm, found in metrics_of(out)["results"].items():
            assert found["step_seconds"] > 0 and found["tokens_per_second"] > 0
            state = stored_state(latest_checkpoint(out / "checkpoints" / arm))
            clock = state["stateful_callbacks"]["StepClock"]["attributes"]
            assert len(clock["seconds"]) == len(clock["tokens"]) == len(found["losses"])
            assert min(clock["seconds"]) > 0


def without_times(found: Any) -> Any:
    if not isinstance(found, dict):
        return found
    return {key: without_times(value) for key, value in found.items() if key not in TIMES}
