"""Peaks of GPUs, and the modelled time of counted work.

    time = Σ over operations of max(FLOPs / attained FLOP/s, bytes / attained bytes/s, issue)

Attained is a fraction of the data sheet's peak, the same one for every GPU and every contestant:
an H100 that multiplies at 650 TFLOP/s and copies at 2.8 TB/s attains 0.66 and 0.84. A 16-bit
product in Triton is assumed to run as fast as cuBLAS's, and nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

ATTAINED_FLOPS = 0.66
ATTAINED_BYTES = 0.84


class Operation(Protocol):
    """A launch, or one pass of it: FLOPs of its matrix products, bytes read and written, and a
    lower bound of its time from its instructions where they are known."""

    @property
    def flops(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def issue_seconds(self) -> float: ...


@dataclass(frozen=True)
class Roofline:
    """Peaks of one GPU: dense bfloat16 products with float32 sums, float32 products on the FMA
    pipes, and memory."""

    name: str
    arch: int
    flops: float
    float32_flops: float
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


ROOFLINES = (
    Roofline("A100", 80, 312e12, 19.5e12, 2.039e12, "NVIDIA A100 data sheet, SXM4 80 GB"),
    Roofline("H100", 90, 989.4e12, 67e12, 3.35e12, "NVIDIA H100 data sheet, SXM5"),
    Roofline("B200", 100, 2250e12, 75e12, 8.0e12, "NVIDIA DGX B200 data sheet, one of 8 GPUs"),
    Roofline("RTX 4090", 89, 165.2e12, 82.6e12, 1.008e12, "NVIDIA Ada architecture white paper"),
)
BY_ARCH = {roofline.arch: roofline for roofline in ROOFLINES}
