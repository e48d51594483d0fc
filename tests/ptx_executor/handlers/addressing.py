"""Operands of memory instructions: address spaces, addresses, lanes, values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import Unsupported
from ..memory.layout import CHUNK, GENERIC_LOCAL, GENERIC_SHARED, take
from ..numbers.integers import U32, U64, UNSIGNED
from ..ptx.instructions import Instruction, Operand
from ..ptx.types import REG_SIZE


def space_of(ins: Instruction) -> str:
    """The state space of an access: shared, global, local, const or generic."""
    spaces = ("shared", "global", "local", "const")
    return next((space for space in spaces if ins.in_space(space)), "generic")


def select(batch, q):
    """The lanes of a mask; None for all of them."""
    if q is None:
        return None
    lanes = np.flatnonzero(q)
    return None if lanes.size == batch.lanes else lanes


def addresser(em: Any, op: Operand, *, wide: bool) -> Callable[..., np.ndarray]:
    """Function (batch, r) → addresses: 32 bits in shared and tensor memory, 64 elsewhere."""
    if op[0] != "m":
        raise Unsupported("address operand")
    _, base, offset, _ = op
    dtype = U64 if wide else U32
    mask = 2 ** (8 * dtype.itemsize) - 1
    if base[0] == "r":
        i, more = base[1], dtype.type(offset & mask)
        if REG_SIZE[em.kernel.regs[i]] != dtype.itemsize:
            return lambda batch, r: r[i].astype(dtype) + more
        return (lambda batch, r: r[i] + more) if offset else (lambda batch, r: r[i])
    if base[0] == "s" and base[1] not in em.program.symbols:
        name, more = base[1], dtype.type(offset & mask)
        return lambda batch, r: batch.symbol(name, dtype) + more
    if base[0] == "s":
        value = dtype.type(em.program.symbols[base[1]] + offset)
    elif base[0] == "i":
        value = dtype.type((base[1] + offset) & mask)
    else:
        raise Unsupported(f"address {op}")
    return lambda batch, r: np.full(batch.lanes, value, dtype)


def semantics(ins: Instruction) -> frozenset[str] | None:
    """How an access takes part in ordering: None if plain, else of "acquire" and "release"."""
    strong = ins.has("acquire", "release", "relaxed", "volatile", "mmio")
    if ins.op in ("ld", "st", "ldu") and not strong:
        return None
    if "cta" in ins.mods:
        return frozenset()  # orders nothing between CTAs
    if "acq_rel" in ins.mods:
        return frozenset(("acquire", "release"))
    return frozenset(mod for mod in ins.mods if mod in ("acquire", "release"))


def parts_of(op: Operand) -> list[Operand]:
    """The operands of a vector, or the one that it is."""
    return list(op[1]) if op[0] == "v" else [op]


def memory_for(batch, space, addr):
    """(memory, addresses in it) of an access to a space. NotImplementedError for several."""
    if space == "shared":
        return batch.shared, addr
    if space == "local":
        return batch.local, addr
    if space == "generic":
        window = addr >> np.uint64(56)
        if (window != window[0]).any():
            raise NotImplementedError("generic accesses to several spaces in one instruction")
        if window[0] == GENERIC_SHARED >> 56:
            return batch.shared, (addr - np.uint64(GENERIC_SHARED)).astype(U32)
        if window[0] == GENERIC_LOCAL >> 56:
            return batch.local, addr - np.uint64(GENERIC_LOCAL)
    return batch.global_memory, addr


def values_of(em: Any, ops: list[Operand], size: int) -> list[Callable[..., np.ndarray]]:
    """Functions (batch, r) → arrays of `size` bytes an element."""
    return [_value_of(em, op, UNSIGNED[size]) for op in ops]


def _value_of(em: Any, op: Operand, dtype: np.dtype) -> Callable[..., np.ndarray]:
    if op[0] == "r":
        i = op[1]
        if REG_SIZE[em.kernel.regs[i]] == dtype.itemsize:
            return lambda batch, r: r[i]
        return lambda batch, r: r[i].astype(dtype)
    if op[0] == "i":
        value = dtype.type(op[1] & (2 ** (8 * dtype.itemsize) - 1))
    elif op[0] == "f":
        value = UNSIGNED[op[2]].type(op[1])
    else:
        raise Unsupported(f"stored operand {op}")
    return lambda batch, r: np.full(batch.lanes, value, dtype)


def gather(functions, batch, r, lanes, element, size):
    """The chunk of `size` bytes that every lane stores, from elements of `element` bytes."""
    if len(functions) == 1:
        return take(functions[0](batch, r), lanes)
    chunk = np.empty(
        (batch.lanes if lanes is None else lanes.size, len(functions)), UNSIGNED[element]
    )
    for j, function in enumerate(functions):
        chunk[:, j] = take(function(batch, r), lanes)
    return chunk.view(CHUNK[size])[:, 0]


def per_thread(op: Operand) -> Callable[[list[np.ndarray]], Any]:
    """Function (r) → the operand's value: an int, or an array."""
    if op[0] == "i":
        value = op[1] & 0xFFFFFFFF
        return lambda r: value
    i = op[1]
    return lambda r: r[i]


def of_thread(op: Operand, r: list[np.ndarray], lane: int) -> int:
    """The operand's value for one thread."""
    return op[1] if op[0] == "i" else int(r[op[1]][lane])


def merge(r, register, value, q):
    """Write a register in the threads of a mask."""
    r[register] = value if q is None else np.where(q, value, r[register])


def put(r, register, value, lanes):
    """Write a register in these lanes."""
    if lanes is None:
        r[register] = value
    else:
        new = r[register].copy()
        new[lanes] = value
        r[register] = new
