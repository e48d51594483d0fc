"""Operands of arithmetic as numpy expressions: what every part of the emitter has in common."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import Unsupported
from ..handlers.tensor_moves import harmless_loads
from ..numbers import float_formats, integers
from ..numbers.integers import UNSIGNED
from ..ptx.instructions import Instruction, Operand
from ..ptx.types import REG_SIZE, TYPE_SIZE
from .blocks import Block

BITS = {1: "U8", 2: "U16", 4: "U32", 8: "U64"}  # the name of raw bits of a size
# The name of the numpy type that has a PTX type; bf16 and packed types are raw bits.
NAMES = {
    **{f"{kind}{8 * size}": name for size, name in BITS.items() for kind in "ub"},
    **{f"s{8 * size}": f"S{8 * size}" for size in BITS},
    **{"f16": "F16", "f32": "F32", "f64": "F64"},
}
DTYPES = {
    type_: getattr(float_formats if name[0] == "F" else integers, name)
    for type_, name in NAMES.items()
}


def bits_of(type_: str) -> str:
    """The PTX type of the raw bits of another."""
    return f"b{8 * TYPE_SIZE[type_]}"


def type_of(ins: Instruction) -> str:
    """The last type of an instruction."""
    types = ins.types()
    if not types:
        raise Unsupported(f"no type in {ins.full}")
    return types[-1]


def is_array(op: Operand) -> bool:
    """Whether the operand's expression has a value for every thread."""
    return op[0] in ("r", "!", "s", "x")


def has_array(*ops: Operand) -> bool:
    return any(is_array(op) for op in ops)


class Operands:
    """Expressions for sources and assignments to destinations, under the current mask."""

    def __init__(self, program: Any, block: Block, masked: bool) -> None:
        self.program = program
        self.kernel = program.kernel
        self.waited_loads = harmless_loads(block.instructions)
        self.masked = masked
        self.mask: str | None = None  # name of the mask of the current instruction

    def handler(self, run: Any) -> list[str]:
        """A call of a handler."""
        return [f"{self.program.constant(run)}(batch, r, {self.mask})"]

    def scalar(self, value: Any, type_: str) -> str:
        """The name of a number of a PTX type."""
        return self.program.scalar(DTYPES[type_].type(value))

    def src(self, op: Operand, type_: str, scalar_ok: bool = True) -> str:
        """Expression for an operand read with a PTX type: raw bits for bf16 and packed types.

        An immediate is a scalar, unless an array of it is wanted.
        """
        kind = op[0]
        if kind == "r":
            return self._register(op, type_)
        if kind == "!":
            return f"~r[{op[1]}]"
        if kind == "x":
            return f"batch.special({op[1]!r}).astype({BITS[TYPE_SIZE[type_]]})"
        if kind == "s":
            return self._symbol(op[1], TYPE_SIZE[type_])
        if kind == "i":
            value = self._integer(op[1], type_)
        elif kind == "f":
            value = self._float(op, type_)
        else:
            raise Unsupported(f"operand {op}")
        name = self.program.scalar(value)
        return name if scalar_ok else f"full(batch.lanes, {name})"

    def _register(self, op: Operand, type_: str) -> str:
        stored = self.kernel.regs[op[1]]
        expression = f"r[{op[1]}]"
        if type_ == "pred":
            return expression
        if stored == "pred":
            raise Unsupported("predicate used as a value")
        bits = BITS[TYPE_SIZE[type_]]
        if REG_SIZE[stored] != TYPE_SIZE[type_]:
            expression += f".astype({bits})"
        name = NAMES.get(type_, bits)
        return expression if name == bits else f"{expression}.view({name})"

    def _symbol(self, name: str, size: int) -> str:
        if name in self.program.symbols:
            address = UNSIGNED[size].type(self.program.symbols[name])
            return f"full(batch.lanes, {self.program.scalar(address)})"
        return f"batch.symbol({name!r}, {BITS[size]})"

    @staticmethod
    def _integer(value: int, type_: str) -> np.generic:
        if type_ == "pred":
            return np.bool_(value != 0)
        if type_ in ("f32", "f64"):
            return DTYPES[type_].type(value)
        if type_ == "f16":
            return np.uint16(value & 0xFFFF).view(np.float16)
        dtype = DTYPES.get(type_, UNSIGNED[TYPE_SIZE[type_]])
        bits = 8 * dtype.itemsize
        value &= (1 << bits) - 1
        if dtype.kind == "i" and value >> (bits - 1):
            value -= 1 << bits
        return dtype.type(value)

    @staticmethod
    def _float(op: Operand, type_: str) -> np.generic:
        _, bits, size = op
        raw = UNSIGNED[size].type(bits)
        if type_ in ("f32", "f64"):
            return DTYPES[type_].type(raw.view(f"f{size}"))
        if size != TYPE_SIZE[type_]:
            raise Unsupported(f"float immediate for type {type_}")
        return raw

    def dst(self, op: Operand, expression: str, type_: str, array: bool = True) -> list[str]:
        """Assign an expression of a PTX type to a register; `array`: it has a value per thread."""
        if op[0] == "_":
            return ["pass"]
        if op[0] != "r":
            raise Unsupported(f"destination {op}")
        value = f"({expression})" if array else f"full(batch.lanes, {expression})"
        if type_ != "pred":
            value += self._stored(self.kernel.regs[op[1]], type_)
        if self.mask is not None:
            value = f"where({self.mask}, {value}, r[{op[1]}])"
        return [f"r[{op[1]}] = {value}"]

    @staticmethod
    def _stored(register: str, type_: str) -> str:
        """The conversion of a value of a PTX type to the raw bits of a register."""
        size, want = TYPE_SIZE[type_], REG_SIZE[register]
        bits = BITS[size]
        name = NAMES.get(type_, bits)
        if want < size:
            raise Unsupported(f"{type_} result into a {register} register")
        if want == size:
            return "" if name == bits else f".view({bits})"
        if name[0] == "S":
            return f".astype(S{want * 8}).view({BITS[want]})"
        view = f".view({bits})" if name[0] == "F" else ""
        return f"{view}.astype({BITS[want]})"

    def fsrc(self, op: Operand, type_: str, ftz: bool = False) -> str:
        """A source in a form one can compute with: f32, f64, or f16 and bf16 widened to f32."""
        if type_ in ("f16x2", "bf16x2"):
            halves = f"{self.src(op, 'b32', False)}.view(U16)"
            return f"{halves}.view(F16).astype(F32)" if type_ == "f16x2" else f"bf16_f32({halves})"
        if type_ == "f16":
            return f"{self.src(op, 'f16', False)}.astype(F32)"
        if type_ == "bf16":
            return f"bf16_f32({self.src(op, 'b16', False)})"
        if type_ == "f32x2":
            value = f"{self.src(op, 'b64', False)}.view(F32)"
        else:
            value = self.src(op, type_)
        return f"ftz({value})" if ftz else value

    def fdst(
        self,
        op: Operand,
        expression: str,
        type_: str,
        ftz: bool = False,
        saturate: bool = False,
        array: bool = True,
    ) -> list[str]:
        """Assign what was computed in the form of `fsrc`."""
        if saturate:
            expression = f"sat({expression})"
        if type_ in ("f16", "f16x2", "bf16", "bf16x2"):
            narrow = "to_f16" if type_[0] == "f" else "f32_bf16"
            view = ".view(U32)" if type_.endswith("x2") else ""
            return self.dst(op, f"{narrow}({expression}){view}", bits_of(type_))
        if ftz:
            expression = f"ftz({expression})"
        if type_ == "f32x2":
            return self.dst(op, f"({expression}).view(U64)", "b64")
        return self.dst(op, expression, type_, array)
