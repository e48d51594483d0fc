"""Rooflines of GPUs, and the modelled time of counted work.

    time = Σ over operations of max(FLOPs / attained FLOP/s, bytes / attained bytes/s)

Attained is a fraction of the data sheet's peak, the same one for every GPU and every contestant:
an H100 that multiplies at 650 TFLOP/s and copies at 2.8 TB/s has 0.66 and 0.84. No time between
launches is added, a Triton product is taken to run as fast as cuBLAS's, and nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ATTAINED_FLOPS = 0.66
ATTAINED_BYTES = 0.84


@dataclass(frozen=True)
class Roofline:
    """Peaks of one GPU: dense bfloat16 products with float32 sums, and memory.

    ``tensor_per_cycle`` is FLOPs of one multiprocessor in one clock, which is the peak over
    multiprocessors and boost clock.
    """

    name: str
    arch: int
    flops: float
    bytes: float
    tensor_per_cycle: int
    source: str

    def seconds(self, flops: int, moved: int) -> float:
        """Modelled time of one operation."""
        return max(flops / (self.flops * ATTAINED_FLOPS), moved / (self.bytes * ATTAINED_BYTES))

    def total(self, operations: Iterable[tuple[int, int]]) -> float:
        """Modelled time of operations (FLOPs, bytes), one after the other."""
        return sum(self.seconds(flops, moved) for flops, moved in operations)


ROOFLINES = (
    Roofline("A100", 80, 312e12, 2.039e12, 2048, "NVIDIA A100 data sheet, SXM4 80 GB"),
    Roofline("H100", 90, 989.4e12, 3.35e12, 4096, "NVIDIA H100 data sheet, SXM5"),
    Roofline("B200", 100, 2250e12, 8.0e12, 8192, "NVIDIA DGX B200 data sheet, one of 8 GPUs"),
    Roofline("RTX 4090", 89, 165.2e12, 1.008e12, 512, "NVIDIA Ada GPU architecture white paper"),
)
BY_ARCH = {roofline.arch: roofline for roofline in ROOFLINES}
# GeForce RTX 5090, for the machine-code tables alone: FLOPs a clock of one multiprocessor.
TENSOR_PER_CYCLE = {**{r.arch: r.tensor_per_cycle for r in ROOFLINES}, 120: 512}
