"""Rooflines of GPUs, and how fast they issue instructions.

Issue is the time that all SMs need at the boost clock to issue the instructions of a pass's loop.
It is known for our kernels alone (where it exposes dropout's Philox), so it counts against nobody
else. No time between launches is added.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lora_fast.tuning import rooflines

from .operations import Operation

ATTAINED_FLOPS = 0.66
ATTAINED_BYTES = 0.84


@dataclass(frozen=True)
class Roofline:
    """Peaks of one GPU: dense bfloat16 products with float32 sums, and memory."""

    name: str
    arch: int
    flops: float
    bytes: float
    source: str

    def seconds(self, operation: Operation) -> float:
        """Modelled time of one operation on 16-bit numbers."""
        return max(
            operation.flops / (self.flops * ATTAINED_FLOPS),
            operation.bytes / (self.bytes * ATTAINED_BYTES),
            operation.issue_seconds,
        )

    def total(self, operations: Iterable[Operation]) -> float:
        """Modelled time of operations, one after the other."""
        return sum(self.seconds(operation) for operation in operations)


ROOFLINES = tuple(Roofline(r.name, r.arch, r.flops, r.bytes, r.source) for r in rooflines.ROOFLINES)
BY_ARCH = {roofline.arch: roofline for roofline in ROOFLINES}


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
