"""Rooflines of GPUs (those of lora_fast's own cost model), and how fast they issue instructions.

Issue is the time that all SMs need at the boost clock to issue the instructions of a pass's loop.
It is known for our kernels alone (where it exposes dropout's Philox), so it counts against nobody
else. No time between launches is added.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_fast.tuning.rooflines import (
    ATTAINED_BYTES,
    ATTAINED_FLOPS,
    BY_ARCH,
    ROOFLINES,
    Roofline,
)

__all__ = [
    "ATTAINED_BYTES",
    "ATTAINED_FLOPS",
    "BY_ARCH",
    "ROOFLINES",
    "SPEEDS",
    "Roofline",
    "Speed",
]


@dataclass(frozen=True)
class Speed:
    """FLOPs of one multiprocessor's tensor cores in a clock, which times multiprocessors and boost
    clock (Hz) is the peak."""

    tensor_per_cycle: int
    multiprocessors: int
    boost_clock: float


SPEEDS = {
    80: Speed(2048, 108, 1.41e9),
    89: Speed(512, 128, 2.52e9),
    90: Speed(4096, 132, 1.83e9),
    100: Speed(8192, 148, 1.85e9),
    120: Speed(512, 170, 2.41e9),  # GeForce RTX 5090
}
