"""pytest-benchmark's view of one adapted linear; `python -m bench.linear` prints paired ratios.

These run one variant after the other, so on a machine whose speed drifts only the paired ratios
compare them fairly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.instruments.device_label import backend_name, default_device, label
from bench.linear_cases import DIRECTIONS, Case, build, cases, fused_calls

# On a CPU, the CPU time of one thread; on a GPU, the wall time until its work ends.
TIMER = time.perf_counter if default_device().type == "cuda" else time.process_time
CASES = [(case, variant) for case in cases(default_device()) for variant in case.variants]


@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("case", "variant"), CASES, ids=lambda value: str(value).replace(" ", "-"))
def test_linear(
    case: Case, variant: str, direction: str, device: torch.device, benchmark: Any
) -> None:
    benchmark.group = f"{case} {direction}"
    benchmark.extra_info.update(device=label(device), backend=backend_name(device))
    layer = build(case, device)[variant]
    benchmark(_synchronised(layer.step(direction), device))
    if variant == "lora_fast":
        assert fused_calls(layer) > 0, "the fused path never ran"


def _synchronised(step: Callable[[], object], device: torch.device) -> Callable[[], None]:
    def run() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run
