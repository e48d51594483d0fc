"""mma.sync: products of a warp, m16n8 of every type but packed 4-bit ones, and float64."""

from __future__ import annotations

import numpy as np

from ..errors import Unsupported
from ..numbers.float_formats import F32, F64, to_f16
from ..numbers.integers import U32, U64
from .addressing import parts_of
from .matrix_operands import ELEMENT_SIZE, fragment
from .warps import spread, warps_of


def mma(em, ins):
    """D = A · B + C, each sum in float64 with one rounding."""
    if ins.mods[0] != "sync" or ins.has("sp", "block_scale", "popc"):
        raise Unsupported(ins.full)
    shape = next(mod for mod in ins.mods if mod[0] == "m" and mod[1].isdigit())
    column = ins.mods.index("col")
    if ins.mods[column - 1] != "row":
        raise Unsupported(ins.full)
    types = tuple(mod for mod in ins.mods[column + 1 :] if mod != "satfinite")[:4]
    if types == ("f64",) * 4:
        return _mma_f64(ins, shape)
    out_type, a_type, b_type, c_type = types
    D, A, B, C = (parts_of(op) for op in ins.args[:4])
    K = int(shape.split("k")[1])
    if (
        not shape.startswith("m16n8")
        or not {a_type, b_type} <= set(ELEMENT_SIZE)
        or out_type not in _ADD
        or out_type != c_type
        or len(A) * 8 != K * ELEMENT_SIZE[a_type]
        or len(B) * 16 != K * ELEMENT_SIZE[b_type]
        or any(op[0] != "r" and (op[0] not in "if" or op[1] != 0) for op in C)
    ):
        raise Unsupported(ins.full)
    A, B = ([op[1] for op in ops] for ops in (A, B))
    C = [op[1] if op[0] == "r" else None for op in C]
    D = [op[1] if op[0] == "r" else None for op in D]
    flops = 2 * 16 * 8 * K
    add, saturates = _ADD[out_type], ins.has("satfinite")

    def run(batch, r, q):
        warps = warps_of(batch, q, ins)
        if warps is not None and warps.size == 0:
            return
        count = batch.lanes // 32 if warps is None else warps.size
        batch.count_mma("mma.sync", count, flops * count)
        a = fragment(batch, r, A, a_type, is_a=True)
        b = fragment(batch, r, B, b_type, is_a=False)
        product = np.matmul(a, b.swapaxes(1, 2))  # (warps, 16, 8)
        for register, value in zip(D, add(batch, r, C, product, saturates), strict=True):
            if register is not None:
                value = value if warps is None else value.reshape(-1, 32)[warps]
                spread(batch, r, register, value, warps)

    return run


def _add_f32(batch, r, C, product, saturates):
    return (_accumulator(batch, r, C).view(F32) + _by_register(product)).astype(F32).view(U32)


def _add_s32(batch, r, C, product, saturates):
    total = _accumulator(batch, r, C).view(np.int32) + _by_register(product)
    if saturates:
        total = np.clip(total, -(2.0**31), 2.0**31 - 1)
    return total.astype(np.int64).astype(U32)


def _add_f16(batch, r, C, product, saturates):
    warps = product.shape[0]
    c = _accumulator(batch, r, C).view(np.float16).reshape(2, warps, 8, 8).astype(F64)
    total = c + product.reshape(warps, 2, 8, 8).transpose(1, 0, 2, 3)
    return to_f16(total).reshape(2, -1).view(U32)


_ADD = {"f32": _add_f32, "f16": _add_f16, "s32": _add_s32}


def _by_register(product):
    """(warps, rows, 8) → (registers, lanes): two columns of every eighth row to a lane."""
    warps, rows, _ = product.shape
    parts = product.reshape(warps, rows // 8, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    return parts.reshape(rows // 4, 32 * warps)


def _accumulator(batch, r, C):
    """The registers of C as rows of one array; without a copy where an mma has written them all."""
    zero = np.zeros(batch.lanes, U32)
    arrays = [zero if register is None else r[register] for register in C]
    base = arrays[0].base
    if base is not None and base.shape == (len(C), batch.lanes) and base.dtype.itemsize == 4:
        start = base.__array_interface__["data"][0]
        if base.flags.c_contiguous and all(
            array.base is base and array.__array_interface__["data"][0] == start + i * array.nbytes
            for i, array in enumerate(arrays)
        ):
            return base.view(U32)
    return np.stack(arrays)


def _mma_f64(ins, shape):
    D, A, B, C = ([op[1] for op in parts_of(operand)] for operand in ins.args[:4])
    M, K = int(shape[1:].split("n")[0]), int(shape.split("k")[1])
    halves = M // 8
    if len(A) != halves * K // 4 or len(B) != K // 4 or len(C) != 2 * halves:
        raise Unsupported(ins.full)

    def run(batch, r, q):
        warps = warps_of(batch, q, ins)
        if warps is not None and warps.size == 0:
            return
        total = batch.lanes // 32
        count = total if warps is None else warps.size
        batch.count_mma("mma.sync", count, 2 * M * 8 * K * count)
        a = np.stack([r[i].view(F64) for i in A]).reshape(K // 4, halves, total, 8, 4)
        a = a.transpose(2, 1, 3, 0, 4).reshape(total, M, K)
        b = np.stack([r[i].view(F64) for i in B]).reshape(K // 4, total, 8, 4)
        b = b.transpose(1, 2, 0, 3).reshape(total, 8, K)
        product = _by_register(np.matmul(a, b.swapaxes(1, 2)))
        for j, register in enumerate(D):
            value = (r[C[j]].view(F64) + product[j]).view(U64)
            value = value if warps is None else value.reshape(-1, 32)[warps]
            spread(batch, r, register, value, warps)

    return run
