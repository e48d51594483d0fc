"""bfloat16 for Triton's interpreter (TRITON_INTERPRET=1), which upstream does not support.

Triton's interpreter keeps bfloat16 as ``numpy.uint16`` bit patterns and hands these patterns
to numpy as they are, so that ``tl.dot``, ``+``, ``*``, comparisons, reductions and casts from and
to integers compute on the patterns; float32 → bfloat16 cuts the mantissa off instead of rounding to
nearest even. ``install()`` replaces those operations by: decode to float32, compute, round once.

Three more differences from compiled code are removed, because they hide mistakes:

- lanes that a masked ``tl.load`` without ``other`` leaves out read as NaN (integers: 0x5A bytes),
  as they are undefined on a GPU; upstream gives zeros;
- a float argument is a float32 scalar tensor (so ``scaling.to(tl.float32)`` works), not a Python
  float; a bool argument is an int1 scalar, where upstream raises;
- ``atomic_add`` on bfloat16 raises instead of adding bit patterns.

Two more changes: a tensor of one element may be the bound of a range, which fails in Triton before
3.7 with NumPy 2.4; and triton.language is patched once a launch, where upstream goes through all of
it at every call of a device function, which takes longer than what most of them compute.

The replaced methods are internals of a few Triton series. For others ``install()`` raises, so that
someone reads the new interpreter and extends ``SUPPORTED`` or deletes what is superfluous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

SUPPORTED = ((3, 5), (3, 10))
"""First series that the patch was written for, and the first that it was not."""

Handle = interpreter.TensorHandle

_BUILDER_METHODS = (
    "binary_op",
    "cast_impl",
    "create_atomic_rmw",
    "create_clampf",
    "create_dot",
    "create_fma",
    "create_fp_to_fp",
    "create_masked_load",
    "unary_op",
)


def install() -> None:
    """Patch the interpreter of this process; a second call does nothing.

    RuntimeError: Triton is of a series that the patch was not written for.
    """
    if getattr(interpreter.InterpreterBuilder, "_computes_bf16", False):
        return
    check_version(triton.__version__)
    builder = interpreter.InterpreterBuilder
    missing = [name for name in _BUILDER_METHODS if not hasattr(builder, name)]
    if missing:
        raise RuntimeError(f"Triton {triton.__version__}: its interpreter has no {missing}")
    upstream = {name: getattr(builder, name) for name in _BUILDER_METHODS}
    _patch_arithmetic(builder, upstream)
    _patch_casts(builder, upstream)
    _patch_memory(builder, upstream)
    _patch_reductions()
    _patch_arguments()
    _patch_indices()
    _patch_once_a_launch()
    builder._computes_bf16 = True


def check_version(version: str) -> None:
    """Raise a RuntimeError unless ``version`` is of the series that the patch was written for."""
    series = tuple(int(part) for part in version.split(".")[:2])
    first, end = SUPPORTED
    if not first <= series < end:
        raise RuntimeError(
            f"triton must be at least {first[0]}.{first[1]} and below {end[0]}.{end[1]} for the "
            f"interpreter tests, got {version}: their bfloat16 patch replaces internals of "
            "triton/runtime/interpreter.py; compare it with the new one, then extend SUPPORTED in "
            f"{__file__}"
        )


def decode(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) as float32: exact."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode(values: np.ndarray, *, toward_zero: bool = False) -> np.ndarray:
    """float32 as bfloat16 bit patterns: to nearest, ties to even; a NaN stays a (quiet) NaN."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    half = np.uint32(0) if toward_zero else np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
    with np.errstate(over="ignore"):
        rounded = (bits + half) >> np.uint32(16)
    return np.where(np.isnan(values), (bits >> 16) | np.uint32(0x40), rounded).astype(np.uint16)


def _is_bf16(handle: Any) -> bool:
    """Whether the data are bfloat16 patterns; a mask made of bfloat16 operands is bool data."""
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _numbers(handle: Any) -> np.ndarray:
    return decode(handle.data) if _is_bf16(handle) else handle.data


def _handle(data: np.ndarray, dtype: tl.dtype) -> Any:
    """The handle of a result whose operands were bfloat16: a mask, patterns or plain numbers."""
    if data.dtype == np.bool_:
        return Handle(data, tl.int1)
    if dtype == tl.bfloat16:
        return Handle(encode(data), dtype)
    return Handle(data.astype(interpreter._get_np_dtype(dtype)), dtype)


def _patch_arithmetic(builder: Any, upstream: dict[str, Callable[..., Any]]) -> None:
    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., np.ndarray]) -> Any:
        if not (_is_bf16(lhs) or _is_bf16(rhs)):
            return upstream["binary_op"](self, lhs, rhs, op)
        return _handle(op(_numbers(lhs), _numbers(rhs)), lhs.dtype.scalar)

    def unary_op(self: Any, arg: Any, op: Callable[..., np.ndarray]) -> Any:
        if not _is_bf16(arg):
            return upstream["unary_op"](self, arg, op)
        return _handle(op(_numbers(arg)), tl.bfloat16)

    def create_clampf(self: Any, arg: Any, low: Any, high: Any, propagate_nans: Any) -> Any:
        if not _is_bf16(arg):
            return upstream["create_clampf"](self, arg, low, high, propagate_nans)
        return _handle(np.clip(_numbers(arg), _numbers(low), _numbers(high)), tl.bfloat16)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not _is_bf16(z):
            return upstream["create_fma"](self, x, y, z)
        exact = _numbers(x).astype(np.float64) * _numbers(y) + _numbers(z)
        return _handle(exact.astype(np.float32), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if not (_is_bf16(a) and _is_bf16(b)):
            return upstream["create_dot"](self, a, b, d, precision, imprecise)
        product = np.matmul(_numbers(a), _numbers(b)) + d.data
        return Handle(product.astype(d.data.dtype), d.dtype.scalar)

    builder.binary_op = binary_op
    builder.unary_op = unary_op
    builder.create_clampf = create_clampf
    builder.create_fma = create_fma
    builder.create_dot = create_dot
    builder.get_bf16 = lambda self, value: Handle(
        encode(np.array([value], dtype=np.float32)), tl.bfloat16
    )


def _patch_casts(builder: Any, upstream: dict[str, Callable[..., Any]]) -> None:
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        target = dst_type.scalar
        if target == tl.bfloat16:
            data = src.data if _is_bf16(src) else encode(src.data.astype(np.float32))
            return Handle(data, target)
        if _is_bf16(src):
            return Handle(decode(src.data).astype(interpreter._get_np_dtype(dst_type)), target)
        return upstream["cast_impl"](self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16 and source.primitive_bitwidth >= 16:
            toward_zero = rounding_mode == ir.ROUNDING_MODE.RTZ
            return Handle(encode(_numbers(src), toward_zero=toward_zero), target)
        return upstream["create_fp_to_fp"](self, src, dst_type, rounding_mode)

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp


def _patch_memory(builder: Any, upstream: dict[str, Callable[..., Any]]) -> None:
    def create_masked_load(
        self: Any, ptrs: Any, mask: Any, other: Any, *hints: Any, **kw: Any
    ) -> Any:
        if other is None:
            dtype = ptrs.get_element_ty()
            other = Handle(np.full(ptrs.data.shape, _undefined(dtype)), dtype)
        return upstream["create_masked_load"](self, ptrs, mask, other, *hints, **kw)

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, *rest: Any) -> Any:
        if val.dtype.scalar == tl.bfloat16:
            raise NotImplementedError("atomic_add on bfloat16 is not interpreted")
        return upstream["create_atomic_rmw"](self, op, ptr, val, *rest)

    builder.create_masked_load = create_masked_load
    builder.create_atomic_rmw = create_atomic_rmw


def _undefined(dtype: Any) -> Any:
    """The value of a lane that a masked load leaves out."""
    np_dtype = interpreter._get_np_dtype(dtype)
    if dtype.is_bf16():
        return np_dtype.type(0x7FC0)
    if np_dtype.kind == "f":
        return np_dtype.type(np.nan)
    if np_dtype == np.bool_:
        return np.bool_(True)
    return np.frombuffer(b"\x5a" * np_dtype.itemsize, dtype=np_dtype)[0]


def _patch_reductions() -> None:
    """Reduce and scan bfloat16 in float32, and round the result.

    Compiled code combines bfloat16 in an order of its own and may round in between, so that a
    kernel must not depend on the last bit here.
    """
    base = interpreter.ReduceScanOpInterface
    apply_upstream = base.apply

    def apply(self: Any, operands: Any) -> Any:
        if not isinstance(operands, tuple):
            return apply(self, (operands,))[0]
        if not any(_is_bf16(operand.handle) for operand in operands):
            return apply_upstream(self, operands)
        results = apply_upstream(self, tuple(_widened(operand) for operand in operands))
        return tuple(
            _narrowed(result, like) for result, like in zip(results, operands, strict=True)
        )

    base.apply = apply


def _widened(operand: Any) -> Any:
    if not _is_bf16(operand.handle):
        return operand
    return _tensor(decode(operand.handle.data), tl.float32)


def _narrowed(result: Any, like: Any) -> Any:
    if not _is_bf16(like.handle):
        return result
    scalar = not result.type.is_block()
    return _tensor(encode(result.handle.data), tl.bfloat16, scalar=scalar)


def _tensor(data: np.ndarray, dtype: Any, *, scalar: bool = False) -> Any:
    tensor_type = dtype if scalar else tl.block_type(dtype, list(data.shape))
    return tl.tensor(Handle(data, dtype), tensor_type)


def _patch_arguments() -> None:
    convert_upstream = interpreter._implicit_cvt

    def _implicit_cvt(arg: Any) -> Any:
        if isinstance(arg, bool):
            return tl.tensor(Handle(np.array([arg], dtype=np.bool_), tl.int1), tl.int1)
        if isinstance(arg, float):
            return tl.tensor(Handle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
        return convert_upstream(arg)

    interpreter._implicit_cvt = _implicit_cvt


def _patch_indices() -> None:
    patch_upstream = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        patch_upstream(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = _patch_lang_tensor


def _patch_once_a_launch() -> None:
    """Replace the functions of triton.language once for a launch, not at every call within it.

    A device function sees what its launch, or an earlier call of the launch, has replaced; one that
    knows the language by another of its two modules replaces that one's, too.
    """
    patch_upstream = interpreter._patch_lang
    launch_upstream = interpreter.GridExecutor.__call__
    patched: set[Any] = set()

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            return launch_upstream(self, *args, **kwargs)
        finally:
            patched.clear()

    def _patch_lang(fn: Callable[..., Any]) -> Any:
        modules = {value for value in fn.__globals__.values() if value is tl or value is tl.core}
        if modules and modules <= patched:
            return None
        patched.update(modules)
        return patch_upstream(fn)

    interpreter.GridExecutor.__call__ = launch
    interpreter._patch_lang = _patch_lang
