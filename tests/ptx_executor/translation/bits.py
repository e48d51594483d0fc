"""Logic, shifts, bit fields and byte permutations."""

from __future__ import annotations

from ..errors import Unsupported
from ..numbers.integers import PRMT_MODES
from ..ptx.types import TYPE_SIZE
from .operands import BITS, NAMES, Operands, has_array, type_of


class Bits(Operands):
    """Instructions on bits."""

    def _logic(self, ins, symbol):
        ty = type_of(ins)
        d, a, b = ins.args
        return self.dst(d, f"{self.src(a, ty)} {symbol} {self.src(b, ty)}", ty, has_array(a, b))

    def op_and(self, ins):
        return self._logic(ins, "&")

    def op_or(self, ins):
        return self._logic(ins, "|")

    def op_xor(self, ins):
        return self._logic(ins, "^")

    def op_not(self, ins):
        ty = type_of(ins)
        d, a = ins.args
        return self.dst(d, f"~{self.src(a, ty, False)}", ty)

    def op_cnot(self, ins):
        ty = type_of(ins)
        d, a = ins.args
        return self.dst(d, f"({self.src(a, ty, False)} == 0).astype({BITS[TYPE_SIZE[ty]]})", ty)

    def op_lop3(self, ins):
        if len(ins.args) != 5:
            raise Unsupported(ins.full)
        d, a, b, c, table = ins.args
        rest = f"{self.src(b, 'b32')}, {self.src(c, 'b32')}, {table[1]}"
        return self.dst(d, f"lop3({self.src(a, 'b32', False)}, {rest})", "b32")

    def _shift(self, ins, symbol):
        ty = type_of(ins)
        d, a, b = ins.args
        width = 8 * TYPE_SIZE[ty]
        ty = f"u{width}" if symbol == "<<" else ty
        x = self.src(a, ty, False)
        if b[0] == "i":
            by = min(b[1] & 0xFFFFFFFF, width)
            if by == width:  # in two steps
                most, one = self.scalar(width - 1, ty), self.scalar(1, ty)
                return self.dst(d, f"({x} {symbol} {most}) {symbol} {one}", ty)
            return self.dst(d, f"{x} {symbol} {self.scalar(by, ty)}", ty)
        # numpy defines shifts by the full width as 0, or the sign.
        by = f"np.minimum({self.src(b, 'u32')}, {self.scalar(width, 'u32')})"
        return self.dst(d, f"{x} {symbol} {by}.astype({NAMES[ty]})", ty)

    def op_shl(self, ins):
        return self._shift(ins, "<<")

    def op_shr(self, ins):
        return self._shift(ins, ">>")

    def op_shf(self, ins):
        d, a, b, c = ins.args
        function = "shf_l" if "l" in ins.mods else "shf_r"
        words = f"{self.src(a, 'b32', False)}, {self.src(b, 'b32', False)}"
        by = f"{self.src(c, 'u32')}, {'clamp' in ins.mods}"
        return self.dst(d, f"{function}({words}, {by})", "b32")

    def op_bfe(self, ins):
        ty = type_of(ins)
        d, a, b, c = ins.args
        width = 8 * TYPE_SIZE[ty]
        unsigned = f"u{width}"
        if b[0] == c[0] == "i":
            start, length = b[1] & 0xFF, c[1] & 0xFF
            if length > 0 and start + length <= width:
                x = self.src(a, ty, False)
                if ty[0] == "u":
                    by, mask = self.scalar(start, ty), self.scalar((1 << length) - 1, ty)
                    return self.dst(d, f"({x} >> {by}) & {mask}", ty)
                up = self.scalar(width - start - length, ty)
                return self.dst(d, f"({x} << {up}) >> {self.scalar(width - length, ty)}", ty)
        field = f"{self.src(b, 'u32')}, {self.src(c, 'u32')}, {ty[0] == 's'}"
        return self.dst(d, f"bfe({self.src(a, unsigned, False)}, {field})", unsigned)

    def op_bfi(self, ins):
        ty = type_of(ins)
        d, a, b, start, length = ins.args
        words = f"{self.src(a, ty, False)}, {self.src(b, ty, False)}"
        field = f"{self.src(start, 'u32')}, {self.src(length, 'u32')}"
        return self.dst(d, f"bfi({words}, {field})", ty)

    def op_bmsk(self, ins):
        d, start, length = ins.args
        ones, zeros = (
            f"full(batch.lanes, {self.scalar(value, 'u32')})" for value in (0xFFFFFFFF, 0)
        )
        field = f"{self.src(start, 'u32')}, {self.src(length, 'u32')}"
        return self.dst(d, f"bfi({ones}, {zeros}, {field})", "b32")

    def _count(self, ins):
        """popc, clz and bfind, which give an u32."""
        d, a = ins.args
        more = f", {'shiftamt' in ins.mods}" if ins.op == "bfind" else ""
        return self.dst(d, f"{ins.op}({self.src(a, type_of(ins), False)}{more})", "u32")

    op_popc = op_clz = op_bfind = _count

    def op_brev(self, ins):
        ty = type_of(ins)
        d, a = ins.args
        return self.dst(d, f"brev({self.src(a, ty, False)})", ty)

    def op_prmt(self, ins):
        d, a, b, c = ins.args
        mode = next((mod for mod in ins.mods if mod in PRMT_MODES), None)
        words = f"{self.src(a, 'b32', False)}, {self.src(b, 'b32')}"
        if mode:
            return self.dst(d, f"prmt_mode({words}, {self.src(c, 'u32')}, {mode!r})", "b32")
        if c[0] == "i":
            return self.dst(d, f"prmt_const({words}, {c[1] & 0xFFFF})", "b32")
        return self.dst(d, f"prmt({words}, {self.src(c, 'u32')})", "b32")
