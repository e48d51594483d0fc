"""Tensor maps, which bulk copies are described by, and the instructions that edit them.

Their 128 bytes are opaque in the architecture; here: 0 u64 address | 8 u8 rank − 1, element type,
interleave, swizzle, fill | 16 u16 box[5] | 26 u8 element stride[5] | 32 u32 dim[5] | 56 u64
stride[4] in bytes. Innermost dimension first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import PTXError, Unsupported
from ..numbers.integers import U8, U16, U32, U64
from .addressing import addresser, of_thread
from .matrix_operands import swizzle
from .warps import warps_of

ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2, 11: 4, 12: 4}
ELEMENT_TYPE = {0: "u8", 1: "u16", 2: "u32", 3: "s32", 4: "u64", 5: "s64"}
ELEMENT_TYPE |= {6: "f16", 7: "f32", 8: "f32", 9: "f64", 10: "bf16"}
TF32 = (11, 12)  # float32 that a load rounds
# The NaN that fills what is out of bounds, on request.
NANS = {
    6: np.uint16(0x7FFF),
    7: np.uint32(0x7FFFFFFF),
    8: np.uint32(0x7FFFFFFF),
    9: np.uint64(0x7FF8000000000000),
    10: np.uint16(0x7FFF),
    11: np.uint32(0x7FFFFFFF),
}
_PATTERNS = {0: 16, 1: 32, 2: 64, 3: 128}  # bytes of the swizzle
# Of tensormap.replace: offset and size.
_FIELDS = {
    "global_address": (0, 8),
    "rank": (8, 1),
    "elemtype": (9, 1),
    "interleave_layout": (10, 1),
    "swizzle_mode": (11, 1),
    "fill_mode": (12, 1),
    "box_dim": (16, 2),
    "element_stride": (26, 1),
    "global_dim": (32, 4),
    "global_stride": (56, 8),
}


def encode_map(
    addr: int,
    element: int,
    pattern: int,
    fill: int,
    box: Sequence[int],
    dims: Sequence[int],
    strides: Sequence[int],
) -> np.ndarray:
    """A tiled tensor as 128 bytes; `strides` in bytes, without the innermost dimension's."""
    rank = len(dims)
    raw = np.zeros(128, U8)
    raw[0:8].view(U64)[0] = addr
    raw[8:13] = rank - 1, element, 0, pattern, fill
    raw[16:26].view(U16)[:rank] = box
    raw[26:31] = 1
    raw[32:52].view(U32)[:rank] = dims
    raw[56:88].view(U64)[: rank - 1] = strides
    return raw


class TensorMap:
    """A decoded tensor map. PTXError for one that hardware would refuse."""

    def __init__(self, raw: bytes) -> None:
        fields = np.frombuffer(raw, U8)
        self.addr = int(fields[0:8].view(U64)[0])
        self.rank = rank = int(fields[8]) + 1
        self.element, interleave, self.swizzle, self.fill = (int(x) for x in fields[9:13])
        self.box = [int(x) for x in fields[16:26].view(U16)[:rank]]
        self.dims = [int(x) for x in fields[32:52].view(U32)[:rank]]
        self.strides = [int(x) for x in fields[56:88].view(U64)[: max(rank - 1, 0)]]
        plain = not interleave and (fields[26:31][:rank] == 1).all() and all(self.box)
        if rank > 5 or self.element not in ELEMENT_BYTES or not plain:
            kind = f"rank {rank}, element type {self.element}"
            raise PTXError(f"tensor map not understood or not initialised ({kind})")
        self.element_bytes = ELEMENT_BYTES[self.element]
        self.row_bytes = self.box[0] * self.element_bytes
        self.nbytes = self.row_bytes * int(np.prod(self.box[1:], dtype=np.int64))
        if self.addr & 15:
            raise PTXError(f"tensor map base address {self.addr:#x} is not 16 byte aligned")
        if any(stride & 15 for stride in self.strides):
            raise PTXError(f"tensor map strides {self.strides} are not multiples of 16 bytes")
        if self.row_bytes % 16:
            size = f"{self.row_bytes} bytes is not a multiple of 16"
            raise PTXError(f"tensor map inner box of {size}")

    def in_shared(self, base: int) -> np.ndarray:
        """Address in shared memory of every 16-byte chunk of the box, (rows, chunks)."""
        pattern = _PATTERNS[self.swizzle]
        if pattern > 16 and self.row_bytes > pattern:
            excess = f"{self.row_bytes} bytes exceeds the {pattern} byte swizzle"
            raise PTXError(f"inner box of {excess}")
        rows = np.arange(self.nbytes // self.row_bytes)[:, None] * self.row_bytes
        return swizzle(base + rows + np.arange(0, self.row_bytes, 16)[None, :], pattern)

    def in_global(self, coords: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(address, whether it is inside the tensor) of every element of the box at `coords`."""
        inner = coords[0] + np.arange(self.box[0], dtype=np.int64)
        inside = (inner >= 0) & (inner < self.dims[0])
        addr = inner * self.element_bytes
        for d in range(1, self.rank):
            i = coords[d] + np.arange(self.box[d], dtype=np.int64)
            good = (i >= 0) & (i < self.dims[d])
            addr = ((i * self.strides[d - 1])[:, None] + addr).reshape(-1)
            inside = (good[:, None] & inside).reshape(-1)
        return (addr + self.addr).astype(U64), inside


def read_map(batch, addr, lane):
    """The tensor map at an address in global or parameter memory; not counted as read."""
    memory, lanes = batch.global_memory, np.full(8, lane)
    chunks = np.uint64(addr) + np.arange(0, 128, 16, dtype=U64)
    raw = memory.load(batch, chunks, 16, lanes, "tensor map read")
    memory.nread -= 128
    return TensorMap(raw.tobytes())


def tensormap(em, ins):
    """tensormap.replace and cp_fenceproxy."""
    if ins.mods[0] == "replace":
        return _replace(em, ins)
    if ins.mods[0] == "cp_fenceproxy":
        return _copy(em, ins)
    raise Unsupported(ins.full)


def _replace(em, ins):
    offset, size = _FIELDS[ins.mods[2]]
    address = addresser(em, ins.args[0], wide=False)
    if not ins.in_space("shared"):
        raise Unsupported(ins.full)
    if len(ins.args) == 3:
        offset += size * ins.args[1][1]

    def run(batch, r, q):
        shared, addr = batch.shared, address(batch, r)
        for lane in np.arange(batch.lanes) if q is None else np.flatnonzero(q):
            lanes = np.array([lane])
            at = shared.index(batch, addr[lanes], 16, lanes, "tensormap.replace")[0] + offset
            value = of_thread(ins.args[-1], r, lane) & (256**size - 1)
            shared.raw[at : at + size] = np.frombuffer(value.to_bytes(size, "little"), U8)

    return run


def _copy(em, ins):
    """128 bytes from shared to global memory, once for a warp."""
    destination = addresser(em, ins.args[0], wide=True)
    source = addresser(em, ins.args[1], wide=False)
    offsets = np.arange(0, 128, 16)

    def run(batch, r, q):
        warps = warps_of(batch, q, ins)
        to, frm = destination(batch, r), source(batch, r)
        for warp in range(batch.lanes // 32) if warps is None else warps:
            lane, what = int(warp) * 32, "tensormap copy"
            lanes = np.full(8, lane)
            chunks = batch.shared.load(batch, frm[lane] + offsets.astype(U32), 16, lanes, what)
            addr = to[lane] + offsets.astype(U64)
            batch.global_memory.store(batch, addr, 16, chunks, lanes, what)

    return run
