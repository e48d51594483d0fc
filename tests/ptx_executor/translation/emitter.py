"""An instruction as lines of Python: arithmetic inline, the rest as a call of a handler."""

from __future__ import annotations

import numpy as np

from ..errors import PTXError, Unsupported
from ..handlers import (
    async_copies,
    atomics,
    bulk_copies,
    calls,
    loads_and_stores,
    matrix_moves,
    mbarriers,
    mma,
    tcgen05,
    tensor_maps,
    warps,
    wgmma,
)
from ..memory.layout import GENERIC_LOCAL, GENERIC_SHARED
from ..ptx.instructions import Instruction
from ..ptx.types import TYPE_SIZE
from .arithmetic import Arithmetic
from .bits import Bits
from .conversions import Conversions
from .operands import BITS, NAMES, bits_of, has_array, type_of
from .selection import Selection

# Without an effect on what is executed. Of barriers only bar.warp.sync is in a block: the threads
# of a warp run together.
_IGNORED = ("nanosleep", "setmaxnreg", "griddepcontrol", "discard", "applypriority", "pmevent")
_IGNORED += ("prefetch", "prefetchu", "bar", "barrier")

_HANDLERS = {
    "ld": loads_and_stores.load,
    "ldu": loads_and_stores.load,
    "st": loads_and_stores.store,
    "fence": loads_and_stores.fence,
    "membar": loads_and_stores.fence,
    "atom": atomics.atomic,
    "red": atomics.atomic,
    "ldmatrix": matrix_moves.ldmatrix,
    "stmatrix": matrix_moves.stmatrix,
    "mma": mma.mma,
    "wgmma": wgmma.wgmma,
    "mbarrier": mbarriers.mbarrier,
    "tcgen05": tcgen05.tcgen05,
    "tensormap": tensor_maps.tensormap,
    "shfl": warps.shfl,
    "vote": warps.vote,
    "redux": warps.redux,
    "activemask": warps.activemask,
    "elect": warps.elect,
    "call": calls.call,
}


class Emitter(Arithmetic, Bits, Selection, Conversions):
    """The instructions of one block, masked or not."""

    def emit(self, ins: Instruction) -> list[str]:
        """The lines of an instruction. Unsupported."""
        if ins.op in _IGNORED:
            return ["pass"]
        lines = []
        self.mask = "m" if self.masked else None
        if ins.pred is not None:
            register, negated = ins.pred
            predicate = f"~r[{register}]" if negated else f"r[{register}]"
            lines = [f"q = {predicate} & m" if self.masked else f"q = {predicate}"]
            self.mask = "q"
        translate = getattr(self, "op_" + ins.op, None)
        if translate is not None:
            return lines + translate(ins)
        if ins.op not in _HANDLERS:
            raise Unsupported(f"no implementation of {ins.full}")
        return lines + self._handled(_HANDLERS[ins.op](self, ins))

    def _handled(self, run):
        return ["pass"] if run is None else self.handler(run)

    def op_ld(self, ins):
        if "param" not in ins.mods or ins.args[1][1][0] == "r":
            # A parameter by an address in a register is one of two or more.
            return self._handled(loads_and_stores.load(self, ins))
        ty = type_of(ins)
        d, (_, base, offset, _) = ins.args
        if base[0] != "s" or base[1] not in self.program.params:
            raise Unsupported(f"parameter address in {ins.text}")
        ty = bits_of(ty) if ty[0] == "f" else ty
        lines = []
        for i, part in enumerate(d[1] if d[0] == "v" else (d,)):
            at = offset + i * TYPE_SIZE[ty]
            lines += self.dst(part, f"batch.param({base[1]!r}, {at}, {NAMES[ty]})", ty)
        return lines

    def op_st(self, ins):
        if "param" not in ins.mods:
            return self._handled(loads_and_stores.store(self, ins))
        address, value = ins.args  # an argument of a function that is called next
        if value[0] == "v":
            raise Unsupported(ins.full)
        expression = self.src(value, bits_of(type_of(ins)), False)
        return [f"batch.call_arguments[{address[1][1]!r}] = {expression}"]

    def op_cp(self, ins):
        handler = bulk_copies.bulk if "bulk" in ins.mods else async_copies.cp_async
        return self._handled(handler(self, ins))

    def op_createpolicy(self, ins):
        return self.dst(ins.args[0], self.scalar(0, "u64"), "b64", array=False)

    def op_trap(self, ins):
        return [f"batch.trap({self.program.constant(PTXError('trap executed'))}, {self.mask})"]

    def op_mov(self, ins):
        ty = type_of(ins)
        d, source = ins.args
        if ty == "pred":
            return self.dst(d, self.src(source, "pred"), "pred", has_array(source))
        if d[0] == "v":
            return self._unpack(d[1], source, ty)
        if source[0] == "v":
            return self._pack_parts(d, source[1], ty)
        bits = bits_of(ty)
        if source[0] in ("i", "f"):
            ty = ty if ty in ("f32", "f64") else bits
            return self.dst(d, self.src(source, ty), ty, array=False)
        return self.dst(d, self.src(source, bits), bits)

    def _unpack(self, parts, source, ty):
        size = TYPE_SIZE[ty] // len(parts)
        value = f"{self.src(source, bits_of(ty), False)}.view({BITS[size]})"
        lines = [f"t = {value}.reshape(batch.lanes, {len(parts)})"]
        for i, part in enumerate(parts):
            lines += self.dst(part, f"t[:, {i}].copy()", f"b{size * 8}")
        return lines

    def _pack_parts(self, d, parts, ty):
        size = TYPE_SIZE[ty] // len(parts)
        lines = [f"t = np.empty((batch.lanes, {len(parts)}), {BITS[size]})"]
        for i, part in enumerate(parts):
            value = "0" if part[0] == "_" else self.src(part, f"b{8 * size}")
            lines.append(f"t[:, {i}] = {value}")
        return lines + self.dst(d, f"t.view({BITS[TYPE_SIZE[ty]]})[:, 0]", bits_of(ty))

    def op_cvta(self, ins):
        d, source = ins.args
        bits = bits_of(type_of(ins))
        value = self.src(source, bits, False)
        windows = {"shared": GENERIC_SHARED, "local": GENERIC_LOCAL}
        window = next((base for space, base in windows.items() if ins.in_space(space)), None)
        if window is not None:
            sign = "-" if "to" in ins.mods else "+"
            value = f"{value} {sign} {self.program.scalar(np.uint64(window))}"
        elif not ins.has("global", "param", "const"):
            raise Unsupported(f"address space of {ins.full}")
        return self.dst(d, value, bits)
