"""Peaks of GPUs, the share of them that is attained, and the modelled time of a pass.

    time = max( FLOPs / attained FLOP/s,  bytes / attained bytes/s,  issue )

and for a Triton product with W, which has a tile,

    time = max( FLOPs / (e · attained FLOP/s),  shared memory,  L2,  bytes / attained bytes/s )

e = time of cuBLAS for a product ÷ time of a Triton kernel for the same product (product_speed.py).
Nothing overlaps but what one launch does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ..kernels.launch_policy import SMALL_SHARED, TENSOR_MEMORY, GemmConfig


class Operation(Protocol):
    """A launch, or one pass of it: FLOPs of its matrix products, bytes read and written, a lower
    bound of its time from its instructions where they are known; the tile of a Triton product with
    W, None for all else; and the bytes of a matrix that cuBLAS adds its product to."""

    @property
    def flops(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def issue_seconds(self) -> float: ...
    @property
    def tile(self) -> GemmConfig | None: ...
    @property
    def added_to(self) -> int: ...


@dataclass(frozen=True)
class Roofline:
    """One GPU. Peaks: dense bfloat16 products with float32 sums, float32 products on the FMA pipes,
    memory; ``attained_flops`` and ``attained_bytes``: what cuBLAS and a copy reach of them.

    ``multiprocessors`` and ``clock`` (Hz, boost) make clocks of what a tile loads: ``l2`` is read
    at so many bytes per second, as measured (None: nobody published it); one multiprocessor moves
    ``shared`` bytes per clock through its shared memory.
    """

    name: str
    arch: int
    flops: float
    float32_flops: float
    bytes: float
    source: str
    attained_flops: float
    attained_bytes: float
    attained_source: str
    multiprocessors: int
    clock: float
    l2: float | None = None
    shared: float = 128.0

    @property
    def tensor_per_clock(self) -> float:
        """FLOPs of one multiprocessor's tensor cores in a clock."""
        return self.flops / (self.multiprocessors * self.clock)

    def seconds(self, operation: Operation, e: float = 1.0) -> float:
        """Modelled time of one operation on 16-bit numbers."""
        return self._seconds(operation, self.flops * self.attained_flops, e)

    def float32_seconds(self, operation: Operation, e: float = 1.0) -> float:
        """The same on float32 numbers with IEEE products, which no tensor core makes."""
        return self._seconds(operation, self.float32_flops * self.attained_flops, e)

    def tf32_seconds(self, operation: Operation, e: float = 1.0) -> float:
        """The same on float32 numbers in TF32, at half of the peak of 16 bits."""
        return self._seconds(operation, 0.5 * self.flops * self.attained_flops, e)

    def _seconds(self, operation: Operation, flops: float, e: float) -> float:
        moved = operation.bytes / self.copied
        exposed = EXPOSED_C * operation.added_to / self.copied
        multiplied = operation.flops / flops
        if operation.tile is not None:
            multiplied = max(
                multiplied / e, operation.flops / self.flops * self.stretch(operation.tile)
            )
        return max(multiplied + exposed, moved, operation.issue_seconds)

    def total(self, operations: Iterable[Operation], e: float = 1.0) -> float:
        """Modelled time of operations, one after the other."""
        return sum(self.seconds(operation, e) for operation in operations)

    @property
    def copied(self) -> float:
        """Bytes per second of a copy, read and written."""
        return self.bytes * self.attained_bytes

    def stretch(self, tile: GemmConfig) -> float:
        """Clocks that a tile's K-loop takes at least, over those of its tensor cores at their peak:
        what shared memory and L2 make of it, 1 if neither is in the way."""
        step = tensor_clocks(tile, self.tensor_per_clock)
        found = shared_bytes(tile, self.arch) / self.shared
        if self.l2 is not None:
            found = max(found, l2_bytes(tile) * self.multiprocessors * self.clock / self.l2)
        return max(1.0, found / step)


# Of the matrix that cuBLAS adds its product to (beta = 1), the part whose reading nothing hides: an
# assumption. A tile reads it in its epilogue, when another CTA of its multiprocessor may multiply.
EXPOSED_C = 0.3


def tensor_clocks(tile: GemmConfig, flops_per_clock: float) -> float:
    """Clocks of one multiprocessor's tensor cores for one K-step of a tile."""
    return 2 * tile.BLOCK_M * tile.BLOCK_N * tile.BLOCK_K / flops_per_clock


def l2_bytes(tile: GemmConfig) -> int:
    """Bytes of X and W that a K-step of a tile loads, 16-bit; no two CTAs share a load."""
    return 2 * tile.BLOCK_K * (tile.BLOCK_M + tile.BLOCK_N)


def shared_bytes(tile: GemmConfig, arch: int) -> int:
    """Bytes through one multiprocessor's shared memory in a K-step of a tile.

    wgmma (sm_90): each warpgroup multiplies 64 rows and reads all of W's tile for them; copies come
    through the same port. tcgen05 (sm_100): one instruction reads 128 rows and the tile of W once;
    published times rule out that its copies take the same port. mma.sync: each warp reads the rows
    and columns of its own part.
    """
    loaded = l2_bytes(tile)
    if arch in TENSOR_MEMORY:
        return loaded
    if arch == 90 and tile.BLOCK_M >= 64:
        groups = tile.BLOCK_M // 64
        return loaded + 2 * tile.BLOCK_K * groups * (64 + tile.BLOCK_N)
    down = max(1, min(tile.num_warps, tile.BLOCK_M // (32 if tile.num_warps > 4 else 64)))
    across = max(1, tile.num_warps // down)
    return loaded + 2 * tile.BLOCK_K * (tile.BLOCK_M * across + tile.BLOCK_N * down)


_COPY = "the share of an H100 that copies at 3.0 TB/s"
ROOFLINES = (
    Roofline(
        "A100", 80, 312e12, 19.5e12, 2.039e12, "NVIDIA A100 data sheet, SXM4 80 GB",
        0.87, 0.895, f"cuBLAS 273 TFLOP/s at 8192³, fp16 (triton issue 743); {_COPY}",
        108, 1.41e9, l2=5.4e12,
    ),
    Roofline(
        "H100", 90, 989.4e12, 67e12, 3.35e12, "NVIDIA H100 data sheet, SXM5",
        0.807, 0.895, f"cuBLAS 798 TFLOP/s at 8192³ (github.com/pranjalssh/fast.cu); {_COPY}",
        132, 1.83e9, l2=9.7e12,
    ),
    Roofline(
        "B200", 100, 2250e12, 75e12, 8.0e12, "NVIDIA DGX B200 data sheet, one of 8 GPUs",
        0.807, 0.895, f"none found: the shares of an H100; {_COPY}",
        148, 1.85e9,
    ),
    Roofline(
        "RTX 4090", 89, 165.2e12, 82.6e12, 1.008e12, "NVIDIA Ada architecture white paper",
        0.92, 0.895, f"cuBLAS 105-115 of 119.5 TFLOP/s on an L20 (LeetCUDA, hgemm); {_COPY}",
        128, 2.52e9, l2=5.2e12,
    ),
)  # fmt: skip
L2_SOURCE = (
    "github.com/te42kyfo/gpu-benches, gpu-l2-cache, for 20 MB on an A100, on an H200, which has an "
    "H100's multiprocessors and L2, and on an L40, which has a 4090's chip"
)
BY_ARCH = {roofline.arch: roofline for roofline in ROOFLINES}


def roofline_of(arch: int | None) -> Roofline:
    """That of the architecture, or of the nearest one with a data sheet here."""
    if arch in SMALL_SHARED:
        return BY_ARCH[89]
    older = [known for known in (80, 90, 100) if known <= (arch or 90)]
    return BY_ARCH[older[-1] if older else 80]
