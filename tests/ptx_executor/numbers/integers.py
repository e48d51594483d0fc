"""Integer and bit instructions on arrays; the element types of registers."""

from __future__ import annotations

import numpy as np

U8, U16, U32, U64 = (np.dtype(name) for name in ("u1", "u2", "u4", "u8"))
S8, S16, S32, S64 = (np.dtype(name) for name in ("i1", "i2", "i4", "i8"))
UNSIGNED = {1: U8, 2: U16, 4: U32, 8: U64}
SIGNED = {1: S8, 2: S16, 4: S32, 8: S64}
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


def trunc_div(a, b):
    """C style division; x/0 gives all ones as the hardware does."""
    zero = b == 0
    divisor = np.where(zero, b.dtype.type(1), b)
    signed = a.dtype.kind == "i"
    quotient = (a - np.fmod(a, divisor)) // divisor if signed else a // divisor
    return np.where(zero, a.dtype.type(-1 if signed else np.iinfo(a.dtype).max), quotient)


def trunc_rem(a, b):
    """Remainder with the sign of `a`."""
    zero = b == 0
    return np.where(zero, a, np.fmod(a, np.where(zero, b.dtype.type(1), b)))


def mulhi32s(a, b):
    """Upper half of the product; so are the next."""
    return ((a.astype(S64) * b) >> np.int64(32)).astype(S32)


def mulhi32u(a, b):
    return ((a.astype(U64) * b) >> np.uint64(32)).astype(U32)


def mulhi64u(a, b):
    m = np.uint64(0xFFFFFFFF)
    s = np.uint64(32)
    a0, a1, b0, b1 = a & m, a >> s, b & m, b >> s
    t = a0 * b0
    u = a1 * b0 + (t >> s)
    v = a0 * b1 + (u & m)
    return a1 * b1 + (u >> s) + (v >> s)


def mulhi64s(a, b):
    h = mulhi64u(a.view(U64), b.view(U64)).view(S64)
    return h - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)


def mulhi16s(a, b):
    return ((a.astype(S32) * b) >> np.int32(16)).astype(S16)


def mulhi16u(a, b):
    return ((a.astype(U32) * b) >> np.uint32(16)).astype(U16)


def _ones(bits):
    """That many low bits set."""
    return np.where(bits >= 64, _ALL, (np.uint64(1) << np.minimum(bits, 63)) - np.uint64(1))


def bfe(a, pos, length, signed):
    """`length` bits of `a`, an unsigned array, from bit `pos` on."""
    n = a.dtype.itemsize * 8
    pos = np.minimum(np.asarray(pos).astype(S64) & 0xFF, 255)
    length = np.minimum(np.asarray(length).astype(S64) & 0xFF, 255)
    w = a.astype(U64)
    p = np.minimum(pos, 64).astype(U64)
    mask = _ones(np.clip(np.minimum(pos + length, n) - pos, 0, n).astype(U64))
    f = (w >> p) & mask
    if signed:
        sp = np.minimum(pos + length - 1, n - 1)
        sign = (w >> np.maximum(sp, 0).astype(U64)) & np.uint64(1)
        sign = np.where(length == 0, np.uint64(0), sign)
        f = np.where(sign == 1, f | ~mask, f)
    return f.astype(a.dtype)


def bfi(a, b, pos, length):
    """`length` bits of `a` put into `b` at bit `pos`."""
    n = b.dtype.itemsize * 8
    pos = np.minimum(np.asarray(pos).astype(S64) & 0xFF, 64)
    length = np.minimum(np.asarray(length).astype(S64) & 0xFF, 64)
    av = np.clip(np.minimum(pos + length, n) - pos, 0, n).astype(U64)
    p = pos.astype(U64)
    mask = _ones(av) << p
    return ((b.astype(U64) & ~mask) | ((a.astype(U64) << p) & mask)).astype(b.dtype)


def shf_l(a, b, c, clamp):
    """Upper word of b:a shifted left."""
    c = np.asarray(c).astype(U64)
    c = np.minimum(c, 32) if clamp else c & np.uint64(31)
    x = (b.astype(U64) << np.uint64(32)) | a.astype(U64)
    return ((x << c) >> np.uint64(32)).astype(U32)


def shf_r(a, b, c, clamp):
    """Lower word of b:a shifted right."""
    c = np.asarray(c).astype(U64)
    c = np.minimum(c, 32) if clamp else c & np.uint64(31)
    x = (b.astype(U64) << np.uint64(32)) | a.astype(U64)
    return (x >> c).astype(U32)


def popc(a):
    """Number of bits set."""
    return np.bitwise_count(a).astype(U32)


def clz(a):
    """Number of leading zeros."""
    n = a.dtype.itemsize * 8
    x = a.copy()
    s = 1
    while s < n:
        x |= x >> x.dtype.type(s)
        s *= 2
    return (n - np.bitwise_count(x).astype(U32)).astype(U32)


def brev(a):
    """Bits in reverse."""
    b = np.unpackbits(a[:, None].view(U8), axis=1, bitorder="little")
    return np.packbits(b[:, ::-1], axis=1, bitorder="little").view(a.dtype)[:, 0]


def bfind(a, shiftamt):
    """Position of the highest bit that is not the sign."""
    n = a.dtype.itemsize * 8
    u = a
    if a.dtype.kind == "i":
        ud = np.dtype(f"u{a.dtype.itemsize}")
        u = np.where(a < 0, ~a, a).view(ud)
    pos = (n - 1 - clz(u).astype(S32)).astype(S32)
    if shiftamt:
        return np.where(pos < 0, np.uint32(0xFFFFFFFF), (n - 1 - pos).astype(U32))
    return pos.view(U32)


def prmt_const(a, b, sel):
    """prmt in generic mode with a known selector; a, b may be scalars."""
    a, b = np.broadcast_arrays(a, b)
    a = np.ascontiguousarray(a).view(U8).reshape(-1, 4)
    b = np.ascontiguousarray(b).view(U8).reshape(-1, 4)
    out = np.empty((max(a.shape[0], b.shape[0]), 4), U8)
    for i in range(4):
        s = (sel >> (4 * i)) & 0xF
        byte = (a if s & 4 == 0 else b)[:, s & 3]
        out[:, i] = (byte.view(S8) >> np.int8(7)).view(U8) if s & 8 else byte
    return out.view(U32)[:, 0]


def prmt(a, b, c):
    """Bytes of b:a chosen by the nibbles of `c`."""
    x = (np.asarray(b).astype(U64) << np.uint64(32)) | np.asarray(a).astype(U64)
    c = np.asarray(c)
    out = 0
    for i in range(4):
        s = (c >> np.uint32(4 * i)).astype(U64)
        byte = (x >> ((s & np.uint64(7)) << np.uint64(3))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        byte = np.where((s & np.uint64(8)) != 0, sign, byte)
        out = out | (byte << np.uint64(8 * i))
    return out.astype(U32)


PRMT_MODES = {
    "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
    "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
    "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
    "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
    "ecr": (0x0000, 0x1110, 0x2210, 0x3210),
    "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
}


def prmt_mode(a, b, c, mode):
    """prmt in one of its named modes."""
    t = np.array(PRMT_MODES[mode], U32)
    return prmt(a, b, t[np.asarray(c) & np.uint32(3)])


def lop3(a, b, c, lut):
    """Any boolean function of three inputs from its truth table."""
    out = None
    for k in range(8):
        if lut >> k & 1:
            t = (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
            out = t if out is None else out | t
    return out if out is not None else (a & np.uint32(0)) & b & c


def dp4a(a, b, c, sa, sb):
    """Sum of the products of four bytes, added to `c`."""
    x = a.view(U8).reshape(-1, 4)
    y = b.view(U8).reshape(-1, 4)
    x = x.view(S8) if sa else x
    y = y.view(S8) if sb else y
    return (x.astype(S64) * y.astype(S64)).sum(1).astype(U32) + c
