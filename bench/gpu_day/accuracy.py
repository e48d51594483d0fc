"""Errors of the fused layer relative to float64, beside eager PyTorch's, by the suite's rule."""

from __future__ import annotations

from typing import Any

import torch

from bench import accuracy_table
from bench.linear_cases import Case

from .day import Day
from .run_units import Unit

_SIZES = (
    *((1024, 4096, 4096, R) for R in (16, 1, 64, 256)),
    *((1024, 4096, 14336, 16), (1024, 14336, 4096, 16)),
    *((M, 4096, 1024, 16) for M in (1, 17, 64, 300)),
    # No width is a multiple of a tile's; NF4 packs pairs, so K is even.
    (333, 1234, 567, 24),
)


def units(day: Day) -> list[Unit]:
    """bfloat16 first, which most people train in."""
    sizes = ((8, 64, 64, 4),) if day.rehearsal else _SIZES
    cases = [
        Case(*size, dtype, weight)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for size in sizes
        for weight in ("dense", "nf4")
    ]
    return [Unit(str(case), lambda case=case: _checked(day, case)) for case in cases]


def _checked(day: Day, case: Case) -> dict[str, Any]:
    found = accuracy_table.run_case(case, day.device)
    if not day.computes:
        return {"ok": True, "results": [], "summary": "compiled, not run"}
    broken = [f"{row['result']}: {row['broken']}" for row in found if row["broken"]]
    worst = max(row["lora_fast"] / max(row["eager"], 1e-30) for row in found)
    return {
        "ok": not broken,
        "results": found,
        "summary": "; ".join(broken) or f"error at most {worst:.2f} times eager's",
    }
