"""Comparisons, and what chooses by them."""

from __future__ import annotations

from ..errors import Unsupported
from ..ptx.types import FLOATS
from .operands import Operands, bits_of, has_array, type_of

_ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_UNORDERED = {f"{name}u": symbol for name, symbol in _ORDERED.items()}
_COMBINED = {"and": "&", "or": "|", "xor": "^"}


class Selection(Operands):
    """setp, set, selp, slct."""

    def _compare(self, comparison, ty, a, b, ftz):
        if ty == "pred":
            raise Unsupported("setp on predicates")
        if ty in FLOATS:
            return self._of_floats(comparison, self.fsrc(a, ty, ftz), self.fsrc(b, ty, ftz))
        kind = ty[0]
        if comparison in _UNSIGNED:
            kind = "u"
        elif comparison in ("eq", "ne"):
            kind = "b"
        symbol = (_ORDERED | _UNSIGNED)[comparison]
        x, y = self.src(a, kind + ty[1:]), self.src(b, kind + ty[1:])
        return f"({x} {symbol} {y})"

    @staticmethod
    def _of_floats(comparison, x, y):
        nan = f"(np.isnan({x}) | np.isnan({y}))"
        if comparison in ("num", "nan"):
            return nan if comparison == "nan" else f"~{nan}"
        if comparison == "ne":
            return f"(({x} != {y}) & ~{nan})"
        if comparison in _UNORDERED:
            return f"(({x} {_UNORDERED[comparison]} {y}) | {nan})"
        return f"({x} {_ORDERED[comparison]} {y})"

    def op_setp(self, ins):
        ty = type_of(ins)
        d, a, b, *more = ins.args
        if ty.endswith("x2"):
            raise Unsupported("packed setp")
        test = self._compare(ins.mods[0], ty, a, b, ins.has("ftz"))
        array = has_array(a, b)
        combined = ""
        if more:
            combined = f" {_COMBINED[ins.mods[1]]} {self.src(more[0], 'pred')}"
        if d[0] != "|":
            return self.dst(d, test + combined, "pred", array or bool(more))
        return [
            f"t = {test}" if array else f"t = full(batch.lanes, {test})",
            *self.dst(d[1], "t" + combined, "pred"),
            *self.dst(d[2], "~t" + combined, "pred"),
        ]

    def op_set(self, ins):
        types = ins.types()
        if len(ins.args) != 3 or len(types) != 2 or types[0].endswith("x2"):
            raise Unsupported(ins.full)
        d, a, b = ins.args
        test = self._compare(ins.mods[0], types[1], a, b, ins.has("ftz"))
        if types[0] == "f32":
            return self.dst(d, f"{test}.astype(F32)", "f32")
        ones, zeros = self.scalar(0xFFFFFFFF, "u32"), self.scalar(0, "u32")
        return self.dst(d, f"where({test}, {ones}, {zeros})", "u32")

    def op_selp(self, ins):
        ty = type_of(ins)
        d, a, b, which = ins.args
        ty = ty if ty in ("f32", "f64") else bits_of(ty)
        choice = f"{self.src(which, 'pred')}, {self.src(a, ty)}, {self.src(b, ty)}"
        return self.dst(d, f"where({choice})", ty)

    def op_slct(self, ins):
        types = ins.types()
        d, a, b, c = ins.args
        ty = bits_of(types[0])
        test = f"{self.src(c, types[1])} >= {self.scalar(0, types[1])}"
        return self.dst(d, f"where({test}, {self.src(a, ty)}, {self.src(b, ty)})", ty)
