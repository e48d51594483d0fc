"""Types of PTX, their sizes, and how registers of them are stored."""

from __future__ import annotations

SIZES = {1: "b8 u8 s8 pred", 2: "b16 u16 s16 f16 bf16 e4m3x2 e5m2x2", 16: "b128"}
SIZES[4] = "b32 u32 s32 f32 f16x2 bf16x2 tf32"
SIZES[8] = "b64 u64 s64 f64 f32x2"

# Bytes of a value.
TYPE_SIZE = {name: size for size, names in SIZES.items() for name in names.split()}

_STORED = {
    "pred": "pred",
    "b16": "b8 u8 s8 b16 u16 s16 f16 bf16",
    "b32": "b32 u32 s32 f32 f16x2 bf16x2",
    "b64": "b64 u64 s64 f64",
    "b128": "b128",
}
# The declared type of a register → how it is kept: raw bits of 2, 4, 8 or 16 bytes, or a predicate.
REG_TYPES = {name: stored for stored, names in _STORED.items() for name in names.split()}

# Bytes of a stored register.
REG_SIZE = {"b16": 2, "b32": 4, "b64": 8, "pred": 1}

FLOATS = ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2")
