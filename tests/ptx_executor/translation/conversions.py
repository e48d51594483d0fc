"""Conversions between types: cvt."""

from __future__ import annotations

from ..errors import Unsupported
from ..ptx.types import FLOATS, TYPE_SIZE
from .operands import NAMES, Operands

_ROUNDINGS = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")
_TO_INTEGER = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}
_FP8 = ("e4m3x2", "e5m2x2")
# (to, rounding) → the function that narrows float32, and float64.
_NARROW = {
    ("f16", "rn"): "to_f16",
    ("f16", "rz"): "f32_f16_rz",
    ("bf16", "rn"): "f32_bf16",
    ("bf16", "rz"): "f32_bf16_rz",
    ("tf32", "rna"): "tf32_rna",
    ("tf32", "rn"): "tf32_rn",
}
_NARROW_F64 = {("f16", "rn"): "to_f16", ("bf16", "rn"): "f64_bf16"}


def _function(table, key, ins) -> str:
    if key not in table:
        raise Unsupported(ins.full)
    return table[key]


class Conversions(Operands):
    """cvt of every kind, by the types that it converts between."""

    def op_cvt(self, ins):
        types = ins.types()
        if "pack" in ins.mods:
            return self._pack(ins, *types[:2])
        if len(types) != 2 or ins.has("rs"):
            raise Unsupported(ins.full)
        to, frm = types
        rounding = next((mod for mod in ins.mods if mod in _ROUNDINGS), None)
        if to in _FP8:
            return self._to_fp8(ins, to, frm)
        if frm in _FP8:
            return self._from_fp8(ins, to, frm)
        if to in ("f16x2", "bf16x2"):
            return self._pair(ins, to, frm, rounding)
        if to == "tf32":
            value = self.src(ins.args[1], "f32", False)
            function = _function(_NARROW, (to, rounding), ins)
            return self.dst(ins.args[0], f"{function}({value})", "b32")
        if to in FLOATS and frm in FLOATS:
            return self._between_floats(ins, to, frm, rounding)
        if frm in FLOATS:
            d, a = ins.args
            value = self.src(a, frm, False) if frm == "f32" else self.fsrc(a, frm, ins.has("ftz"))
            return self.dst(d, f"float_int({value}, {rounding!r}, {NAMES[to]})", to)
        return self._from_integer(ins, to, frm, rounding)

    def _pair(self, ins, to, frm, rounding):
        """Two float32 → two 16-bit floats."""
        if frm != "f32" or ins.has("satfinite"):
            raise Unsupported(ins.full)
        d, *sources = ins.args
        narrow = _function(_NARROW, (to.removesuffix("x2"), rounding), ins)
        values = [self.src(op, "f32", False) for op in sources]
        if ins.has("relu"):
            values = [f"np.maximum({value}, 0)" for value in values]
        high, low = (f"{narrow}({value})" for value in values)
        return self.dst(d, f"pack2({high}, {low})", "b32")

    def _to_fp8(self, ins, to, frm):
        d, *sources = ins.args
        function, relu = f"to_{to.removesuffix('x2')}", f"relu={ins.has('relu')}"
        if frm == "f32":
            high, low = (f"{function}({self.src(op, 'f32', False)}, {relu})" for op in sources)
            shifted = f"{high}.astype(U16) << {self.scalar(8, 'u16')}"
            return self.dst(d, f"({shifted}) | {low}", "b16")
        return self.dst(d, f"{function}({self.fsrc(sources[0], frm)}, {relu}).view(U16)", "b16")

    def _from_fp8(self, ins, to, frm):
        if to != "f16x2":
            raise Unsupported(ins.full)
        d, a = ins.args
        table = frm.removesuffix("x2").upper()
        return self.dst(
            d, f"to_f16({table}[{self.src(a, 'b16', False)}.view(U8)]).view(U32)", "b32"
        )

    def _between_floats(self, ins, to, frm, rounding):
        d, a = ins.args
        if ins.has("satfinite"):
            raise Unsupported(ins.full)
        if frm == "f64":
            return self._from_f64(ins, to, rounding)
        if frm == to and frm in ("f16", "bf16"):
            raise Unsupported(ins.full)
        ftz = ins.has("ftz")
        value = self.src(a, "f32", False) if frm == "f32" else self.fsrc(a, frm)
        if ftz and frm == "f32":
            value = f"ftz({value})"
        if ins.has("relu"):
            value = f"np.maximum({value}, 0)"
        if to == "f64":
            return self.dst(d, f"{value}.astype(F64)", "f64")
        if to == "f32":
            if rounding in _TO_INTEGER:
                value = f"{_TO_INTEGER[rounding]}({value})"
            return self.fdst(d, value, "f32", ftz, ins.has("sat"))
        narrow = _function(_NARROW, (to, rounding or "rn"), ins)
        if ins.has("sat"):
            value = f"sat({value})"
        return self.dst(d, f"{narrow}({value})", "b16")

    def _from_f64(self, ins, to, rounding):
        d, a = ins.args
        value = self.src(a, "f64", False)
        if to == "f32":
            single = f"f64_f32({value}, {rounding!r})"
            return self.fdst(d, single, to, ins.has("ftz"), ins.has("sat"))
        if to == "f64":
            return self.dst(d, f"{_function(_TO_INTEGER, rounding, ins)}({value})", "f64")
        return self.dst(d, f"{_function(_NARROW_F64, (to, rounding), ins)}({value})", "b16")

    def _from_integer(self, ins, to, frm, rounding):
        d, a = ins.args
        value = self.src(a, frm, False)
        if to in ("f32", "f64"):
            floating = f"int_float({value}, {rounding!r}, {NAMES[to]})"
            return self.fdst(d, floating, to, False, ins.has("sat"))
        if to in FLOATS:
            narrow = _function(_NARROW_F64, (to, "rn"), ins)
            return self.dst(d, f"{narrow}({value}.astype(F64))", "b16")
        if ins.has("sat"):
            return self.dst(d, f"clamp_int({value}, {NAMES[to]})", to)
        return self.dst(d, f"{value}.astype({NAMES[to]})", to)

    def _pack(self, ins, to, frm):
        """Two integers saturated, in the place of the lower bits of a third."""
        width = 8 * TYPE_SIZE[to]
        d, *sources = ins.args
        mask = self.scalar((1 << width) - 1, "u32")
        high, low = (
            f"(clamp_int({self.src(op, frm, False)}, {NAMES[to]}).astype(U32) & {mask})"
            for op in sources[:2]
        )
        packed = f"{low} | ({high} << {self.scalar(width, 'u32')})"
        if len(sources) == 3:
            rest = self.src(sources[2], "b32")
            packed += f" | ({rest} << {self.scalar(2 * width, 'u32')})"
        return self.dst(d, packed, "b32")
