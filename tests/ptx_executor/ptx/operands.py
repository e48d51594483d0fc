"""Operands of an instruction, and the scopes that their names are looked up in.

("r", i)                   register number i
("!", i)                   negated predicate register i
("i", value)               integer immediate
("f", bits, size)          floating-point immediate of 4 or 8 bytes
("v", (operands...))       { a, b, ... }
("m", base, off, coords)   [ base + off {, {coords}} ]
("|", a, b)                a|b, a pair of destinations
("s", name)                symbol: variable, parameter or label
("x", name)                special register
("_",)                     bit bucket
"""

from __future__ import annotations

import re
import struct

from .instructions import Operand

_NAME = re.compile(r"[%A-Za-z_$][\w$%]*(?:\.[xyz])?$")
_INTEGER = re.compile(r"[+-]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)[uU]?$")
_DECIMAL = re.compile(r"-?\d+\.\d*([eE][+-]?\d+)?$")
_SUM = re.compile(r"^(.*?)\s*([+-])\s*(-?(?:0[xX][0-9a-fA-F]+|\d+))U?$")
_SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)\.[xyz]$"
    r"|%(laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock_hi|clock64"
    r"|globaltimer|globaltimer_lo|globaltimer_hi|lanemask_(eq|le|lt|ge|gt)"
    r"|cluster_ctarank|cluster_nctarank|is_explicit_cluster"
    r"|dynamic_smem_size|total_smem_size|envreg\d+|pm\d+)$"
)


class PTXSyntaxError(ValueError):
    """Text that is no PTX, or PTX that no kernel of Triton has."""


class Scope:
    """Names declared between a pair of braces; inline assembly opens scopes of its own."""

    def __init__(self, parent: Scope | None, ident: int) -> None:
        self.parent = parent
        self.ident = ident
        self.regs: dict[str, int] = {}
        self.labels: set[str] = set()

    def reg(self, name: str) -> int | None:
        """The number of a register."""
        if name in self.regs:
            return self.regs[name]
        return self.parent.reg(name) if self.parent else None

    def label(self, name: str) -> str | None:
        """The unique name of a label."""
        if name in self.labels:
            return self.unique(name)
        return self.parent.label(name) if self.parent else None

    def unique(self, name: str) -> str:
        return f"{name}#{self.ident}"


def split(text: str) -> list[str]:
    """The parts between top-level commas."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def operand(text: str, scope: Scope) -> Operand:
    """One operand. PTXSyntaxError."""
    text = text.strip()
    if text == "_":
        return ("_",)
    if text[0] in "{(":
        return ("v", tuple(operand(part, scope) for part in split(text[1:-1])))
    if text[0] == "[":
        return _address(text, scope)
    if text[0] == "!":
        return ("!", operand(text[1:], scope)[1])
    if "|" in text:
        first, second = text.split("|", 1)
        return ("|", operand(first, scope), operand(second, scope))
    number = _number(text)
    if number is not None:
        return number
    register = scope.reg(text)
    if register is not None:
        return ("r", register)
    if _SPECIAL.match(text):
        return ("x", text)
    if _NAME.match(text):
        return ("s", text)
    raise PTXSyntaxError(f"operand {text!r}")


def _address(text: str, scope: Scope) -> Operand:
    base, *coords = split(text[1:-1])
    offset = 0
    found = _SUM.match(base)
    if found and found.group(1).strip():
        base = found.group(1).strip()
        offset = int(found.group(3), 0) * (1 if found.group(2) == "+" else -1)
    return ("m", operand(base, scope), offset, tuple(operand(part, scope) for part in coords))


def _number(text: str) -> Operand | None:
    if _INTEGER.match(text):
        digits = text.rstrip("uU").lstrip("+-")
        octal = len(digits) > 1 and digits[0] == "0" and digits[1] not in "xXbB"
        value = int(digits, 8 if octal else 0)
        return ("i", -value if text.startswith("-") else value)
    if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
        return ("f", int(text[2:], 16), 4)
    if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
        return ("f", int(text[2:], 16), 8)
    if _DECIMAL.match(text):
        return ("f", struct.unpack("<Q", struct.pack("<d", float(text)))[0], 8)
    return None
