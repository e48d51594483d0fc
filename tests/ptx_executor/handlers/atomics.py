"""atom and red on global and shared memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import Misaligned, Unsupported
from ..numbers.float_formats import F16, F32, F64, bf16_f32, f32_bf16, to_f16
from ..numbers.integers import SIGNED, U16, UNSIGNED
from ..ptx.types import REG_SIZE, TYPE_SIZE
from .addressing import (
    addresser,
    memory_for,
    parts_of,
    put,
    select,
    semantics,
    space_of,
    take,
    values_of,
)

ATOMIC_OPS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")

_BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_FLOAT = {"add": np.add, "min": np.fmin, "max": np.fmax}
_INTEGER = {"add": np.add, "min": np.minimum, "max": np.maximum}


def _increment(old, limit):
    return np.where(old >= limit, 0, old + old.dtype.type(1)).astype(old.dtype)


def _decrement(old, limit):
    wraps = (old == 0) | (old > limit)
    return np.where(wraps, limit, old - old.dtype.type(1)).astype(old.dtype)


_UNTYPED: dict[str, Callable[..., np.ndarray]] = {
    "cas": lambda old, expected, new: np.where(old == expected, new, old),
    "exch": lambda old, new: new,
    "inc": _increment,
    "dec": _decrement,
    **_BITWISE,
}


def atomic_function(op: str, type_: str) -> Callable[..., np.ndarray]:
    """function(old, *operands) → new, on raw bits."""
    if op in _UNTYPED:
        return _UNTYPED[op]
    if type_ in ("f16", "f16x2"):

        def f16(old, operand):
            a, b = (np.ascontiguousarray(x).view(F16).astype(F32) for x in (old, operand))
            return to_f16(_FLOAT[op](a, b)).view(old.dtype)

        return f16
    if type_ in ("bf16", "bf16x2"):

        def bf16(old, operand):
            a, b = (bf16_f32(np.ascontiguousarray(x).view(U16)) for x in (old, operand))
            return f32_bf16(_FLOAT[op](a, b)).view(old.dtype)

        return bf16
    if type_ in ("f32", "f64"):
        dtype, function = {"f32": F32, "f64": F64}[type_], _FLOAT[op]
    else:
        dtype = (SIGNED if type_[0] == "s" else UNSIGNED)[TYPE_SIZE[type_]]
        function = _INTEGER[op]
    return lambda old, operand: function(old.view(dtype), operand.view(dtype)).view(old.dtype)


def atomic(em, ins):
    """atom, and red, which returns nothing; vectors go element by element."""
    space, width, type_ = space_of(ins), ins.width(), ins.types()[-1]
    size = TYPE_SIZE[type_]
    op = next((mod for mod in ins.mods if mod in ATOMIC_OPS), None)
    if op is None or size > 8 or (width > 1 and op == "cas"):
        raise Unsupported(ins.full)
    function = atomic_function(op, type_)
    is_red = ins.op == "red"
    address, *operands = ins.args if is_red else ins.args[1:]
    results = [] if is_red else parts_of(ins.args[0])
    where = addresser(em, address, wide=space != "shared")
    count = 2 if op == "cas" else 1
    sources = [values_of(em, parts_of(operand), size) for operand in operands[:count]]
    sem = semantics(ins)
    if is_red and sem:
        sem -= {"acquire"}

    def run(batch, r, q):
        lanes = select(batch, q)
        addr = where(batch, r)
        if lanes is not None:
            if lanes.size == 0:
                return
            addr = addr[lanes]
        memory, addr = memory_for(batch, space, addr)
        extra = (sem,) if memory is batch.global_memory else ()
        misaligned = addr & addr.dtype.type(size * width - 1)
        if width > 1 and misaligned.any():
            k = int(np.flatnonzero(misaligned)[0])
            message = f"misaligned vector atomic of {size * width} bytes"
            raise Misaligned(message, *batch.who(k, lanes), int(addr[k]))
        for j in range(width):
            values = [take(source[j](batch, r), lanes) for source in sources]
            at = addr + addr.dtype.type(size * j) if j else addr
            old = memory.atomic(batch, at, size, lanes, function, values, *extra)
            if results and results[j][0] == "r":
                register = results[j][1]
                wide = UNSIGNED[REG_SIZE[em.kernel.regs[register]]]
                put(r, register, old.view(UNSIGNED[size]).astype(wide), lanes)

    return run
