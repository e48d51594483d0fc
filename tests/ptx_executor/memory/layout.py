"""Address spaces, units of access and the patterns of uninitialised memory."""

from __future__ import annotations

import numpy as np

# The numpy type of an access of so many bytes, and its logarithm.
CHUNK = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
    16: np.dtype(np.complex128),
}
SHIFT = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4}

SHARED_BASE = 1024  # address of the first shared byte, aligned for the widest swizzle
LOCAL_BASE = 256  # address of the first byte of local memory
GENERIC_SHARED = 1 << 56  # generic address of shared address 0
GENERIC_LOCAL = 1 << 57  # generic address of local address 0

POISON16 = 0x7FDF  # NaN in f16 and bf16; repeated: NaN in f32 and f64
POISON = {
    "b16": np.uint16(POISON16),
    "b32": np.uint32(0x7FDF7FDF),
    "b64": np.uint64(0x7FDF7FDF7FDF7FDF),
    "pred": np.bool_(False),
    "b128": np.complex128(0),
}

# Times of accesses count barriers and the like; two are special.
PENDING = 1 << 30  # of an asynchronous access still in flight
OWN = 1 << 29  # up to when a warp knows of itself


def host_buffer(nbytes: int, align: int = 1024) -> tuple[np.ndarray, int]:
    """Zeroed bytes whose address is a multiple of `align`, and that address."""
    raw = np.zeros(nbytes + align, np.uint8)
    offset = -raw.ctypes.data % align
    return raw[offset : offset + nbytes], raw.ctypes.data + offset


def views_of(raw: np.ndarray) -> dict[int, np.ndarray]:
    """These bytes in units of every size."""
    return {size: raw.view(dtype) for size, dtype in CHUNK.items()}


def take(values: np.ndarray, lanes: np.ndarray | None) -> np.ndarray:
    """The values of these lanes; None for all of them."""
    return values if lanes is None else values[lanes]


def as_bytes(values: np.ndarray, *shape: int) -> np.ndarray:
    """The bytes of an array, in another shape."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(shape)
