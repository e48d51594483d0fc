"""Arithmetic: add … rcp, of integers, floats and packed pairs."""

from __future__ import annotations

from ..errors import Unsupported
from ..ptx.types import FLOATS, TYPE_SIZE
from .operands import NAMES, Operands, bits_of, has_array, type_of

_DIRECTED = ("rz", "rm", "rp")
_SIGN = {"f16": 0x8000, "bf16": 0x8000, "f32": 1 << 31, "f64": 1 << 63}
_SIGN |= {"f16x2": 0x80008000, "bf16x2": 0x80008000}


def _unsigned(type_: str) -> str:
    """The type in which sums and products wrap around without a warning."""
    return "u" + type_[1:] if type_[0] in "us" else type_


def _wide(type_: str) -> str:
    return type_[0] + str(16 * TYPE_SIZE[type_])


def _narrow(ins) -> str | None:
    """The type of the narrow operands of add, sub and fma.f32.<type>."""
    types = ins.types()
    if len(types) == 1:
        return None
    if ins.op in ("add", "sub", "fma") and types[0] == "f32" and types[1:] in (["f16"], ["bf16"]):
        return types[1]
    raise Unsupported(ins.full)


def _sign(ins, type_):
    """(the bits of the signs, the type of the raw bits) of a float."""
    if type_ not in _SIGN:
        raise Unsupported(ins.full)
    return _SIGN[type_], f"u{8 * TYPE_SIZE[type_]}"


class Arithmetic(Operands):
    """Instructions that compute."""

    def _packed16(self, ins, form):
        """Two 16-bit integers in each register."""
        if ins.has("sat", "relu"):
            raise Unsupported(ins.full)
        view = ".view(S16)" if "s16x2" in ins.mods else ".view(U16)"
        x, y = (self.src(op, "b32", False) + view for op in ins.args[1:3])
        return self.dst(ins.args[0], f"({form.format(x, y)}).view(U32)", "b32")

    def _binary(self, ins, symbol):
        if ins.has("u16x2", "s16x2"):
            return self._packed16(ins, f"{{}} {symbol} {{}}")
        ty, narrow = type_of(ins), _narrow(ins)
        d, a, b = ins.args
        if ins.has(*_DIRECTED) and (narrow or (ty in FLOATS and ty != "f16")):
            raise Unsupported(f"rounding of {ins.full}")
        if narrow:
            sum_ = f"{self.fsrc(a, narrow)} {symbol} {self.fsrc(b, 'f32')}"
            return self.fdst(d, sum_, "f32", False, ins.has("sat"))
        if ty in FLOATS:
            ftz = ins.has("ftz")
            sum_ = f"{self.fsrc(a, ty, ftz)} {symbol} {self.fsrc(b, ty, ftz)}"
            return self.fdst(d, sum_, ty, ftz, ins.has("sat"), has_array(a, b))
        if "cc" in ins.mods:
            raise Unsupported("carry out")
        if ins.has("sat"):
            wide = f"{self.src(a, ty)}.astype(S64) {symbol} {self.src(b, ty)}"
            return self.dst(d, f"clamp_int({wide}, S32)", ty)
        ty = _unsigned(ty)
        return self.dst(d, f"{self.src(a, ty)} {symbol} {self.src(b, ty)}", ty, has_array(a, b))

    def op_add(self, ins):
        return self._binary(ins, "+")

    def op_sub(self, ins):
        return self._binary(ins, "-")

    def op_mul(self, ins):
        ty = type_of(ins)
        if ty in FLOATS:
            return self._binary(ins, "*")
        d, a, b = ins.args
        return self.dst(d, *self._product(ins, ty, a, b))

    def _product(self, ins, ty, a, b):
        """(expression, type, whether it is an array) of an integer product."""
        if "wide" in ins.mods:
            wide = _wide(ty)
            x, y = (f"{self.src(op, ty)}.astype({NAMES[wide]})" for op in (a, b))
            return f"{x} * {y}", wide, has_array(a, b)
        if "hi" in ins.mods:
            function = f"mulhi{8 * TYPE_SIZE[ty]}{ty[0]}"
            return f"{function}({self.src(a, ty, False)}, {self.src(b, ty, False)})", ty, True
        ty = _unsigned(ty)
        return f"{self.src(a, ty)} * {self.src(b, ty)}", ty, has_array(a, b)

    def op_mul24(self, ins):
        ty = type_of(ins)
        if "lo" not in ins.mods:
            raise Unsupported(ins.full)
        d, *factors = ins.args
        if ty == "u32":
            low = self.scalar(0xFFFFFF, "u32")
            x, y = (f"({self.src(op, ty)} & {low})" for op in factors)
        else:
            eight = self.scalar(8, "s32")
            x, y = (f"(({self.src(op, ty)} << {eight}) >> {eight})" for op in factors)
        return self.dst(d, f"{x} * {y}", ty)

    def op_mad(self, ins):
        ty = type_of(ins)
        if ty in FLOATS:
            return self.op_fma(ins)
        if "cc" in ins.mods:
            raise Unsupported("carry out")
        d, a, b, c = ins.args
        product, ty, array = self._product(ins, ty, a, b)
        return self.dst(d, f"{product} + {self.src(c, ty)}", ty, array or has_array(c))

    def op_fma(self, ins):
        ty, narrow = type_of(ins), _narrow(ins)
        if ins.has(*_DIRECTED):
            raise Unsupported(f"rounding of {ins.full}")
        d, a, b, c = ins.args
        ftz, saturate = ins.has("ftz"), ins.has("sat")
        if narrow:
            factors = f"{self.fsrc(a, narrow)}, {self.fsrc(b, narrow)}"
            return self.fdst(
                d, f"f32_fma({factors}, {self.fsrc(c, 'f32')})", "f32", False, saturate
            )
        if ty in ("f32", "f64", "f32x2"):
            x, y, z = (self.fsrc(op, ty, ftz) for op in (a, b, c))
            return self.fdst(d, f"{ty[:3]}_fma({x}, {y}, {z})", ty, ftz, saturate)
        if saturate or ins.has("relu"):
            raise Unsupported(ins.full)
        bits = bits_of(ty)
        into, back = (".view(U16)", ".view(U32)") if bits == "b32" else ("", "")
        x, y, z = (f"{self.src(op, bits, False)}{into}" for op in (a, b, c))
        return self.dst(d, f"{ty.removesuffix('x2')}_fma({x}, {y}, {z}){back}", bits)

    def op_div(self, ins):
        ty = type_of(ins)
        if ty in FLOATS:
            return self._binary(ins, "/")
        return self._call(ins, "trunc_div", ty)

    def op_rem(self, ins):
        return self._call(ins, "trunc_rem", type_of(ins))

    def _call(self, ins, function, ty):
        d, *sources = ins.args
        arguments = ", ".join(self.src(op, ty, False) for op in sources)
        return self.dst(d, f"{function}({arguments})", ty)

    def _extremum(self, ins, name):
        integer = f"np.{name}imum"
        if ins.has("u16x2", "s16x2"):
            return self._packed16(ins, integer + "({}, {})")
        ty = type_of(ins)
        d, *sources = ins.args
        if ty in FLOATS:
            function = integer if "NaN" in ins.mods else "f" + name
            values = [self.fsrc(op, ty, ins.has("ftz")) for op in sources]
            return self.fdst(
                d, self._extremum_of(ins, function, values), ty, array=has_array(*sources)
            )
        if ins.has("relu") or ty.endswith("x2"):
            raise Unsupported(ins.full)
        a, b = sources
        return self.dst(d, f"{integer}({self.src(a, ty)}, {self.src(b, ty)})", ty, has_array(a, b))

    @staticmethod
    def _extremum_of(ins, function, values):
        x, y, *more = values
        if ins.has("xorsign", "abs"):
            if not (ins.has("xorsign") and ins.has("abs")) or more:
                raise Unsupported(ins.full)
            return f"xorsign({function}(np.abs({x}), np.abs({y})), {x}, {y})"
        least = f"{function}({x}, {y})"
        return f"{function}({least}, {more[0]})" if more else least

    def op_min(self, ins):
        return self._extremum(ins, "min")

    def op_max(self, ins):
        return self._extremum(ins, "max")

    def op_neg(self, ins):
        ty = type_of(ins)
        d, a = ins.args
        if ty in FLOATS:
            sign, bits = _sign(ins, ty)
            return self.dst(d, f"{self.src(a, bits, False)} ^ {self.scalar(sign, bits)}", bits)
        ty = _unsigned(ty)
        return self.dst(d, f"{self.scalar(0, ty)} - {self.src(a, ty, False)}", ty)

    def op_abs(self, ins):
        ty = type_of(ins)
        d, a = ins.args
        if ty in FLOATS:
            sign, bits = _sign(ins, ty)
            rest = self.scalar(sign ^ ((1 << 8 * TYPE_SIZE[ty]) - 1), bits)
            return self.dst(d, f"{self.src(a, bits, False)} & {rest}", bits)
        return self.dst(d, f"np.abs({self.src(a, ty, False)})", ty)

    def op_copysign(self, ins):
        ty = type_of(ins)
        d, sign, size = ins.args
        value = f"np.copysign({self.src(size, ty, False)}, {self.src(sign, ty, False)})"
        return self.dst(d, value, ty)

    def op_testp(self, ins):
        d, a = ins.args
        tests = {"nan": "np.isnan", "notanumber": "np.isnan", "number": "~np.isnan"}
        tests |= {"finite": "np.isfinite", "infinite": "np.isinf"}
        if ins.mods[0] not in tests:
            raise Unsupported(ins.full)
        return self.dst(d, f"{tests[ins.mods[0]]}({self.src(a, type_of(ins), False)})", "pred")

    def op_sad(self, ins):
        ty = type_of(ins)
        d, a, b, c = ins.args
        x, y = self.src(a, ty, False), self.src(b, ty, False)
        return self.dst(d, f"where({x} < {y}, {y} - {x}, {x} - {y}) + {self.src(c, ty)}", ty)

    def op_dp4a(self, ins):
        d, a, b, c = ins.args
        types = [mod for mod in ins.mods if mod in ("u32", "s32")]
        signed = f"{types[0] == 's32'}, {types[-1] == 's32'}"
        factors = f"{self.src(a, 'b32', False)}, {self.src(b, 'b32', False)}"
        return self.dst(d, f"dp4a({factors}, {self.src(c, 'u32')}, {signed})", "u32")

    def _function(self, ins):
        """ex2 … rcp, by the name of the instruction."""
        ty = type_of(ins)
        d, a = ins.args
        if ty == "f64":
            exact = {"sqrt": "np.sqrt({})", "rcp": "1.0 / {}", "rsqrt": "1.0 / np.sqrt({})"}
            if ins.op not in exact:
                raise Unsupported(ins.full)
            return self.dst(d, exact[ins.op].format(self.src(a, ty, False)), ty)
        if ins.has(*_DIRECTED):
            raise Unsupported(ins.full)
        ftz = ins.has("ftz") and ty == "f32"
        value = self.src(a, ty, False) if ty == "f32" else self.fsrc(a, ty)
        value = f"ftz({value})" if ftz else value
        return self.fdst(d, f"{ins.op}({value})", ty, ftz)

    op_ex2 = op_lg2 = op_sin = op_cos = op_tanh = _function
    op_rsqrt = op_sqrt = op_rcp = _function
