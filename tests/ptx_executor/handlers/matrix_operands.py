"""Operands of matrix products: element types, fragments in registers, tiles in shared memory."""

from __future__ import annotations

import functools

import numpy as np

from ..numbers.float_formats import E4M3, E5M2, F32, F64, bf16_f32
from ..numbers.integers import U8, U16

ELEMENT_SIZE = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1}


def decode(words, type_):
    """(..., n) uint32 → (..., n · elements of a word) float64."""
    words = np.ascontiguousarray(words)
    if type_ == "f16":
        return words.view(np.float16).astype(F64)
    if type_ == "bf16":
        return bf16_f32(words.view(U16)).astype(F64)
    if type_ == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(F32).astype(F64)
    if type_ in ("s8", "u8"):
        return words.view(np.int8 if type_ == "s8" else U8).astype(F64)
    if type_ in ("e4m3", "e5m2"):
        return (E4M3 if type_ == "e4m3" else E5M2)[words.view(U8)].astype(F64)
    raise NotImplementedError(f"matrix element type {type_}")


def fragment(batch, r, regs, type_, *, is_a):
    """Operand A (warps, 16, K) or B (warps, 8, K) of mma as float64, kept while registers stay."""
    arrays = [r[i] for i in regs]
    key = (type_, is_a, *map(id, arrays))
    hit = batch.fragments.get(key)
    if hit is not None:
        return hit[0]
    per_row = 4 * 4 // ELEMENT_SIZE[type_]
    values = decode(np.stack(arrays), type_)
    warps = batch.lanes // 32
    if is_a:
        steps = len(regs) // 2
        values = values.reshape(steps, 2, warps, 8, per_row).transpose(2, 1, 3, 0, 4)
        values = values.reshape(warps, 16, steps * per_row)
    else:
        values = values.reshape(len(regs), warps, 8, per_row).transpose(1, 2, 0, 3)
        values = values.reshape(warps, 8, len(regs) * per_row)
    values = np.ascontiguousarray(values)
    if len(batch.fragments) > 256:
        batch.fragments.clear()
    batch.fragments[key] = (values, arrays)  # the arrays keep their ids
    return values


def swizzle(addr, nbytes):
    """Addresses in shared memory with the XOR pattern of 128, 64 or 32 bytes; 16 has none."""
    pattern = {128: 0x70, 64: 0x30, 32: 0x10, 16: 0}[nbytes]
    return addr ^ ((addr >> 3) & pattern)


@functools.cache
def tile_offsets(rows, is_mn_major, element, pattern, leading, stride):
    """Byte offsets before swizzling of the 16-byte chunks of an operand, 32 bytes along K.

    K-major: (rows, chunks along K). MN-major: (K, chunks along the rows).
    """
    if not is_mn_major:
        m, c = np.arange(rows)[:, None], np.arange(2)[None, :]
        if pattern == 16:
            return ((m // 8) * stride + (m % 8) * 16 + c * leading).astype(np.int64)
        return ((m // 8) * stride + (m % 8) * pattern + c * 16).astype(np.int64)
    k, c = np.arange(32 // element)[:, None], np.arange(rows * element // 16)[None, :]
    if pattern == 16:
        return (c * stride + (k % 8) * 16 + (k // 8) * leading).astype(np.int64)
    per = pattern // 16
    across = (c % per) * 16 + (c // per) * leading
    return (across + (k % 8) * pattern + (k // 8) * stride).astype(np.int64)
