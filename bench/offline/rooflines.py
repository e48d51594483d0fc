"""Rooflines of GPUs, and the modelled time of counted work.

    time = Σ over operations of max(FLOPs / attained FLOP/s, bytes / attained bytes/s, issue)

Attained is a fraction of the data sheet's peak, the same one for every GPU and every contestant:
an H100 that multiplies at 650 TFLOP/s and copies at 2.8 TB/s has 0.66 and 0.84. Issue is the time
that all multiprocessors need at the boost clock to issue the instructions of a pass's loop; it is
known of our kernels alone (dropout's Philox is what it finds), so it counts against nobody else. No
time between launches is added, a Triton product is taken to run as fast as cuBLAS's, and nothing
overlaps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
        """Modelled time of one operation."""
        return max(
            operation.flops / (self.flops * ATTAINED_FLOPS),
            operation.bytes / (self.bytes * ATTAINED_BYTES),
            operation.issue_seconds,
        )

    def total(self, operations: Iterable[Operation]) -> float:
        """Modelled time of operations, one after the other."""
        return sum(self.seconds(operation) for operation in operations)


ROOFLINES = (
    Roofline("A100", 80, 312e12, 2.039e12, "NVIDIA A100 data sheet, SXM4 80 GB"),
    Roofline("H100", 90, 989.4e12, 3.35e12, "NVIDIA H100 data sheet, SXM5"),
    Roofline("B200", 100, 2250e12, 8.0e12, "NVIDIA DGX B200 data sheet, one of 8 GPUs"),
    Roofline("RTX 4090", 89, 165.2e12, 1.008e12, "NVIDIA Ada GPU architecture white paper"),
)
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
