"""The ceilings of the device: a product, a copy, a launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .run_units import Unit
from .timing import median_seconds

if TYPE_CHECKING:
    from .day import Day


def units(day: Day) -> list[Unit]:
    """The device's own ceilings, which the report sets beside what operations reach."""
    return [
        Unit("bfloat16 product", lambda: _product(day)),
        Unit("copy", lambda: _copy(day)),
        Unit("launch", lambda: _launch(day)),
    ]


def _product(day: Day) -> dict[str, Any]:
    size = 32 if day.rehearsal else 8192
    a, b = (torch.randn(size, size, device=day.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = median_seconds(lambda: a @ b, day)
    flops = 2 * size**3 / seconds
    return {"size": size, "flops_per_second": flops, "summary": f"{flops / 1e12:.0f} TFLOP/s"}


def _copy(day: Day) -> dict[str, Any]:
    source = torch.empty(2**10 if day.rehearsal else 2**31, dtype=torch.uint8, device=day.device)
    source.random_()
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), day)
    moved = 2 * source.nbytes / seconds
    return {"bytes_per_second": moved, "summary": f"{moved / 1e12:.2f} TB/s read and written"}


def _launch(day: Day) -> dict[str, Any]:
    x = torch.zeros(1, device=day.device)
    seconds = median_seconds(lambda: x.add_(1), day)
    return {"seconds": seconds, "summary": f"{seconds * 1e6:.1f} µs for the smallest launch"}
