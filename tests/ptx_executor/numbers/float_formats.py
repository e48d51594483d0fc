"""Floating-point formats and functions on arrays: bf16, f16, tf32, fp8, conversions.

16-bit values are kept as their bits (uint16). What hardware approximates is (nearly) exact here.
"""

from __future__ import annotations

import numpy as np

from .integers import U8, U16, U32, U64

F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))


def bf16_f32(x):
    """bf16 bits → float32."""
    return (x.astype(U32) << np.uint32(16)).view(F32)


def _one_nan(bits, x):
    """`bits` of 16-bit floats with every NaN of `x` as 0x7fff."""
    nan = np.isnan(x)
    return np.where(nan, np.uint16(0x7FFF), bits) if nan.any() else bits


def f32_bf16(x):
    """float32 → bf16 bits, round to nearest even."""
    u = x.view(U32)
    half = np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))
    return _one_nan(((u + half) >> np.uint32(16)).astype(U16), x)


def f32_bf16_rz(x):
    """float32 → bf16 bits, rounded towards zero."""
    r = (x.view(U32) >> np.uint32(16)).astype(U16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), r)


def f64_bf16(x):
    """float64 → bf16 bits with one rounding, as fma rounds."""
    u = x.view(U64)
    half = np.uint64((1 << 44) - 1) + ((u >> np.uint64(45)) & np.uint64(1))
    y = ((u + half) & ~np.uint64((1 << 45) - 1)).view(F64)
    tiny = np.abs(x) < 2.0**-126
    if tiny.any():
        y = np.where(tiny, np.copysign(np.rint(x * 2.0**133) * 2.0**-133, x), y)
    return _one_nan((y.astype(F32).view(U32) >> np.uint32(16)).astype(U16), x)


def to_f16(x):
    """float32 or float64 → f16 bits, round to nearest even."""
    return _one_nan(x.astype(F16).view(U16), x)


def f32_f16_rz(x):
    """float32 → f16 bits, rounded towards zero."""
    h = x.astype(F16)
    over = np.abs(h.astype(F64)) > np.abs(x.astype(F64))
    b = h.view(U16)
    b = np.where(over, b - np.uint16(1), b)
    return np.where(np.isnan(x), np.uint16(0x7FFF), b)


def pack2(hi, lo):
    """Two arrays of 16-bit patterns → one of 32-bit patterns."""
    out = np.empty((*hi.shape, 2), U16)
    out[..., 0] = lo
    out[..., 1] = hi
    return out.view(U32)[..., 0]


def bf16_fma(a, b, c):
    """a · b + c of bf16 bits, rounded once."""
    a, b, c = (bf16_f32(operand).astype(F64) for operand in (a, b, c))
    return f64_bf16(a * b + c)


def f16_fma(a, b, c):
    """a · b + c of f16 bits, rounded once."""
    a, b, c = (operand.view(F16).astype(F64) for operand in (a, b, c))
    return to_f16(a * b + c)


def f32_fma(a, b, c):
    """a · b + c by way of float64: rarely one unit in the last place off."""
    return (a.astype(F64) * b + c).astype(F32)


def f64_fma(a, b, c):
    """a · b + c, rounded twice."""
    return a * b + c


def ftz(x):
    """Subnormal float32 flushed to zero."""
    tiny = np.abs(x) < np.float32(1.17549435e-38)
    return np.where(tiny, np.copysign(np.float32(0), x), x) if tiny.any() else x


def xorsign(m, x, y):
    """Magnitude m with the product of the signs of x and y."""
    return np.where(np.signbit(x) ^ np.signbit(y), -m, m)


def sat(x):
    """Clamped to [0, 1], NaN to 0."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, x.dtype.type(0), x.dtype.type(1)))


def tf32_rna(x):
    """Round to 10 mantissa bits, ties away from zero."""
    u = x.view(U32)
    r = (u + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), r, u)


def tf32_rn(x):
    """Round to 10 mantissa bits, ties to even."""
    u = x.view(U32)
    r = (u + (np.uint32(0xFFF) + ((u >> np.uint32(13)) & np.uint32(1)))) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), r, u)


def _fp8_table(exponent_bits, bias, has_inf):
    """The value of every byte."""
    mantissa_bits = 7 - exponent_bits
    table = np.zeros(256, F32)
    for code in range(256):
        exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
        mantissa = code & ((1 << mantissa_bits) - 1)
        if has_inf and exponent == (1 << exponent_bits) - 1:
            value = float("nan") if mantissa else float("inf")
        elif not has_inf and code & 0x7F == 0x7F:
            value = float("nan")
        elif exponent == 0:
            value = mantissa * 2.0 ** (1 - bias - mantissa_bits)
        else:
            value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        table[code] = -value if code & 0x80 else value
    return table


E4M3 = _fp8_table(4, 7, has_inf=False)
E5M2 = _fp8_table(5, 15, has_inf=True)


def _fp8_encoder(table, largest, nan):
    """float → the nearest byte of `table`, ties to even, saturating at the byte `largest`."""
    positive = table[: largest + 1].astype(F64)  # ascending

    def encode(x, relu=False):
        x = x.astype(F64)
        size = np.abs(x)
        i = np.searchsorted(positive, size, side="left").clip(1, largest)
        below, above = positive[i - 1], positive[i]
        up = (size - below > above - size) | ((size - below == above - size) & (i % 2 == 0))
        code = np.where(up, i, i - 1)
        code = np.where(size >= positive[largest], largest, code)
        code = np.where(x == 0, 0, code).astype(U8)
        code = code | np.where(np.signbit(x), np.uint8(0x80), np.uint8(0))
        if relu:
            code = np.where(np.signbit(x) & ~np.isnan(x), np.uint8(0), code)
        return np.where(np.isnan(x), np.uint8(nan), code)

    return encode


to_e4m3 = _fp8_encoder(E4M3, 0x7E, 0x7F)
to_e5m2 = _fp8_encoder(E5M2, 0x7B, 0x7F)


def _in_f64(function):
    def rounded_once(x):
        return function(x.astype(F64)).astype(F32)

    return rounded_once


ex2 = _in_f64(np.exp2)
lg2 = _in_f64(np.log2)
sin = _in_f64(np.sin)
cos = _in_f64(np.cos)
tanh = _in_f64(np.tanh)
rsqrt = _in_f64(lambda x: 1.0 / np.sqrt(x))
sqrt = _in_f64(np.sqrt)
rcp = _in_f64(lambda x: 1.0 / x)
fmin, fmax = np.fmin, np.fmax


def float_int(x, rnd, dt):
    """float → integer, saturating, NaN to 0."""
    x = x.astype(F64)
    x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rnd](x)
    info = np.iinfo(dt)
    lo, hi = float(info.min), float(info.max)
    y = np.where(np.isnan(x), 0.0, x)
    big = y >= hi
    small = y <= lo
    safe = np.where(big | small, 0.0, y)
    r = safe.astype(dt)
    return np.where(big, dt.type(info.max), np.where(small, dt.type(info.min), r))


def int_float(x, rnd, ft):
    """integer → float32 or float64 with the given rounding."""
    if ft == F64 and x.dtype.itemsize < 8:
        return x.astype(F64)
    f = x.astype(ft)
    if rnd in (None, "rn"):
        return f
    if x.dtype.itemsize == 8:
        raise NotImplementedError(f"64 bit integer to float with rounding {rnd}")
    d = f.astype(F64) - x.astype(F64)
    if rnd == "rz":
        fix = np.abs(f.astype(F64)) > np.abs(x.astype(F64))
        return np.where(fix, np.nextafter(f, ft.type(0)), f)
    if rnd == "rm":
        return np.where(d > 0, np.nextafter(f, ft.type(-np.inf)), f)
    if rnd == "rp":
        return np.where(d < 0, np.nextafter(f, ft.type(np.inf)), f)
    raise NotImplementedError(rnd)


def f64_f32(x, rnd):
    """float64 → float32 with the given rounding."""
    f = x.astype(F32)
    if rnd in (None, "rn"):
        return f
    d = f.astype(F64)
    if rnd == "rz":
        return np.where(np.abs(d) > np.abs(x), np.nextafter(f, np.float32(0)), f)
    if rnd == "rm":
        return np.where(d > x, np.nextafter(f, np.float32(-np.inf)), f)
    return np.where(d < x, np.nextafter(f, np.float32(np.inf)), f)


def clamp_int(x, dt):
    """Integer array clamped to the range of dtype dt (cvt.sat)."""
    info = np.iinfo(dt)
    if x.dtype.kind == "u":
        return np.minimum(x, x.dtype.type(min(info.max, np.iinfo(x.dtype).max))).astype(dt)
    src = np.iinfo(x.dtype)
    lo, hi = max(info.min, src.min), min(info.max, src.max)
    return np.clip(x, x.dtype.type(lo), x.dtype.type(hi)).astype(dt)
