"""The interpreter's patch against torch: every operation on bfloat16 that a kernel may use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.instruments.accuracy import assert_accurate, assert_same_bits, orders

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from bench.instruments import triton_interpreter  # noqa: E402

interpreted = pytest.mark.interpreter
ROUNDING_CASES = [
    1.0,
    1.0 + 2**-8,  # a tie: down to the even 1.0
    1.0 + 3 * 2**-8,  # a tie: up to the even 1 + 2**-6
    1.0 + 2**-8 + 2**-20,
    -1.0 - 3 * 2**-8,
    0.0,
    -0.0,
    1e-40,
    2**-133,
    3.3961775e38,  # rounds up to infinity
    float("inf"),
    float("-inf"),
    float("nan"),
]


@triton.jit
def _copy_kernel(src_ptr, dst_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    value = tl.load(src_ptr + offs, mask=offs < n, other=0)
    tl.store(dst_ptr + offs, value.to(dst_ptr.dtype.element_ty), mask=offs < n)


def _converted(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    result = torch.empty(source.shape, dtype=dtype)
    _copy_kernel[(1,)](source, result, source.numel(), BLOCK=1024)
    return result


@interpreted
def test_float32_rounds_to_nearest_even() -> None:
    values = torch.cat(
        [torch.tensor(ROUNDING_CASES), torch.randn(500) * 10 ** (20 * torch.rand(500) - 10)]
    )
    converted = _converted(values, torch.bfloat16)
    assert_same_bits(converted.nan_to_num(12.0), values.bfloat16().nan_to_num(12.0), name="cast")
    assert converted[12].isnan()


@interpreted
def test_signalling_nan_with_a_low_payload_stays_nan() -> None:
    values = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert _converted(values, torch.bfloat16).isnan().all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int32])
def test_bfloat16_widens_exactly(dtype: torch.dtype) -> None:
    values = (torch.randn(300) * 50).bfloat16()
    assert_same_bits(_converted(values, dtype), values.to(dtype), name="cast")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.uint8, torch.int64])
def test_other_types_round_to_bfloat16(dtype: torch.dtype) -> None:
    values = (torch.rand(300) * 250).to(dtype)
    assert_same_bits(_converted(values, torch.bfloat16), values.bfloat16(), name="cast")


@interpreted
def test_every_pattern_survives_load_and_store() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for chunk in bits.view(torch.bfloat16).split(1024):
        assert_same_bits(_converted(chunk, torch.bfloat16), chunk, name="copy")


@triton.jit
def _truncating_cast_kernel(src_ptr, dst_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    value = tl.load(src_ptr + offs)
    tl.store(dst_ptr + offs, value.to(tl.bfloat16, fp_downcast_rounding="rtz"))


@interpreted
def test_rounding_toward_zero_on_request() -> None:
    values, result = torch.randn(64), torch.empty(64, dtype=torch.bfloat16)
    _truncating_cast_kernel[(1,)](values, result, BLOCK=64)
    truncated = (values.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    assert_same_bits(result, truncated, name="rtz")


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    offs_m, offs_n, offs_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + offs_m[:, None] * K + offs_k[None, :])
    b = tl.load(b_ptr + offs_k[:, None] * N + offs_n[None, :])
    acc = tl.full([M, N], 1.0, tl.float32)
    acc = tl.dot(a, b, acc)
    tl.store(c_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(c_ptr.dtype.element_ty))


@interpreted
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot(dtype: torch.dtype, out: torch.dtype) -> None:
    a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 16).to(dtype)
    c = torch.empty(32, 16, dtype=out)
    _dot_kernel[(1,)](a, b, c, M=32, N=16, K=64)
    eager = orders(lambda: (a.float() @ b.float() + 1).to(out))
    assert_accurate(c, a.double() @ b.double() + 1, eager, name="dot")


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, out_ptr, scale, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offs)
    b = tl.load(b_ptr + offs)
    if OP == "add":
        result = a + b
    elif OP == "sub":
        result = a - b
    elif OP == "mul":
        result = a * b
    elif OP == "div":
        result = a / b
    elif OP == "neg":
        result = -a
    elif OP == "abs":
        result = tl.abs(a)
    elif OP == "scale":
        result = a.to(tl.float32) * scale.to(tl.float32)
    elif OP == "python_scale":
        result = a * 0.3
    elif OP == "maximum":
        result = tl.maximum(a, b)
    elif OP == "minimum":
        result = tl.minimum(a, b)
    elif OP == "where":
        result = tl.where(a > b, a, b)
    elif OP == "mixed":
        result = a + b.to(tl.float32)
    elif OP == "full":
        result = a * tl.full([BLOCK], 1.5, tl.bfloat16)
    elif OP == "fma":
        result = tl.fma(a, b, a)
    tl.store(out_ptr + offs, result.to(out_ptr.dtype.element_ty))


ARITHMETIC: dict[str, Any] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a, b: -a,
    "abs": lambda a, b: a.abs(),
    "scale": lambda a, b: (a.float() * 0.3).bfloat16(),
    "python_scale": lambda a, b: a * torch.tensor(0.3).bfloat16(),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda a, b: torch.where(a > b, a, b),
    "mixed": lambda a, b: (a.float() + b.float()).bfloat16(),
    "full": lambda a, b: a * 1.5,
    "fma": lambda a, b: (a.double() * b.double() + a.double()).float().bfloat16(),
}


@interpreted
@pytest.mark.parametrize("op", ARITHMETIC)
def test_arithmetic_computes_wide_and_rounds_once(op: str) -> None:
    a, b = torch.randn(256).bfloat16(), torch.randn(256).bfloat16()
    result = torch.empty(256, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](a, b, result, 0.3, OP=op, BLOCK=256)
    assert_same_bits(result, ARITHMETIC[op](a, b), name=op)


@triton.jit
def _comparison_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offs)
    b = tl.load(b_ptr + offs)
    tl.store(out_ptr + offs, (a < b).to(tl.int32))
    tl.store(out_ptr + BLOCK + offs, (a == b).to(tl.int32))
    tl.store(out_ptr + 2 * BLOCK + offs, (a >= b).to(tl.bfloat16).to(tl.int32))


@interpreted
def test_comparisons_order_by_value() -> None:
    a, b = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    a[:4], b[:4] = torch.tensor([0.0, -0.0, 1.0, float("nan")]), torch.tensor([-0.0, 0.0, 1.0, 1.0])
    result = torch.empty(3, 64, dtype=torch.int32)
    _comparison_kernel[(1,)](a, b, result, BLOCK=64)
    assert torch.equal(result, torch.stack([a < b, a == b, a >= b]).int())


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, OP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    offs_m, offs_n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + offs_m[:, None] * N + offs_n[None, :])
    if OP == "sum":
        result = tl.sum(x, axis=1)
    elif OP == "max":
        result = tl.max(x, axis=1)
    elif OP == "min":
        result = tl.min(x, axis=1)
    elif OP == "argmax":
        result = tl.argmax(x, axis=1)
    elif OP == "cumsum":
        result = tl.sum(tl.cumsum(x.to(tl.float32), axis=1), axis=1)
    tl.store(out_ptr + offs_m, result.to(tl.float32))


@interpreted
@pytest.mark.parametrize("op", ["sum", "max", "min", "argmax", "cumsum"])
def test_reductions(op: str) -> None:
    x, result = torch.randn(16, 32).bfloat16(), torch.empty(16)
    _reduce_kernel[(1,)](x, result, OP=op, M=16, N=32)
    wide = x.double()
    expected = {
        "sum": wide.sum(1),
        "max": wide.amax(1),
        "min": wide.amin(1),
        "argmax": wide.argmax(1).double(),
        "cumsum": wide.cumsum(1).sum(1),
    }[op]
    eager = expected.bfloat16() if op == "sum" else expected.float()
    dtype = torch.bfloat16 if op == "sum" else torch.float32
    assert_accurate(result, expected, eager, name=op, compute_dtype=dtype)


@triton.jit
def _scalar_sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    total = tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)))
    tl.store(out_ptr, total.to(tl.float32))


@interpreted
def test_sum_to_a_scalar() -> None:
    result = torch.empty(1)
    _scalar_sum_kernel[(1,)](torch.full((64,), 1.5).bfloat16(), result, BLOCK=64)
    assert result.item() == 96.0


@triton.jit
def _ticket_kernel(counter_ptr, flag_ptr, order_ptr):
    ticket = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    tl.store(order_ptr + ticket, tl.program_id(0))
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr + ticket, 7, sem="release")
    while tl.atomic_add(flag_ptr + ticket, 0, sem="acquire") != 7:
        pass


@interpreted
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_atomics_hand_out_tickets(dtype: torch.dtype) -> None:
    counter, flag = torch.zeros(1, dtype=dtype), torch.zeros(5, dtype=dtype)
    order = torch.empty(5, dtype=torch.int32)
    _ticket_kernel[(5,)](counter, flag, order)
    assert counter.item() == 5
    assert flag.tolist() == [7] * 5
    assert order.tolist() == [0, 1, 2, 3, 4]


@triton.jit
def _atomic_bf16_kernel(ptr):
    tl.atomic_add(ptr + tl.arange(0, 16), tl.full([16], 1.0, tl.bfloat16))


@interpreted
def test_bfloat16_atomics_are_refused() -> None:
    with pytest.raises(Exception, match="atomic_add on bfloat16 is not interpreted"):
        _atomic_bf16_kernel[(1,)](torch.zeros(16, dtype=torch.bfloat16))


@triton.jit
def _masked_load_kernel(src_ptr, dst_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(dst_ptr + offs, tl.load(src_ptr + offs, mask=offs < n))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lanes_that_a_load_leaves_out_are_undefined(dtype: torch.dtype) -> None:
    result = torch.zeros(16, dtype=dtype)
    _masked_load_kernel[(1,)](torch.ones(16, dtype=dtype), result, 5, BLOCK=16)
    assert result[:5].eq(1).all()
    assert result[5:].isnan().all()


@interpreted
def test_integer_lanes_that_a_load_leaves_out_are_undefined() -> None:
    result = torch.zeros(16, dtype=torch.int16)
    _masked_load_kernel[(1,)](torch.ones(16, dtype=torch.int16), result, 5, BLOCK=16)
    assert result.tolist() == [1] * 5 + [0x5A5A] * 11


@triton.jit
def _scalar_arguments_kernel(out_ptr, scale, flag, bias):
    value = scale.to(tl.float32) * 2.0
    if flag:
        value += bias
    tl.store(out_ptr, value)


@interpreted
@pytest.mark.parametrize("flag", [True, False])
def test_scalar_arguments_are_tensors_as_in_compiled_code(flag: bool) -> None:
    result = torch.empty(1)
    _scalar_arguments_kernel[(1,)](result, 0.25, flag, 3)
    assert result.item() == (3.5 if flag else 0.5)


@pytest.mark.parametrize("version", ["3.4.0", "3.10.0", "4.0.0+git123"])
def test_another_triton_is_refused(version: str) -> None:
    with pytest.raises(RuntimeError, match=r"triton must be at least 3\.5 and below 3\.10"):
        triton_interpreter.check_version(version)


def test_the_pinned_triton_is_supported() -> None:
    triton_interpreter.check_version("3.7.1")


@triton.jit
def _doubled(value):
    return value + value


@triton.jit
def _doubling_kernel(ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    for _ in range(3):
        tl.store(ptr + offs, _doubled(tl.load(ptr + offs)))
    tl.store(ptr + offs, tl.load(ptr + offs) - tl.sum(tl.load(ptr + offs), axis=0))


@interpreted
def test_a_launch_replaces_the_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it calls a function; and once more where tl.sum knows tl.core."""
    from triton.runtime import interpreter

    patched: list[object] = []
    patch = interpreter._patch_builtin

    def counted(package: object, *rest: object) -> None:
        patched.append(package)
        patch(package, *rest)

    monkeypatch.setattr(interpreter, "_patch_builtin", counted)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for launches in (1, 2):
        result = values.clone()
        _doubling_kernel[(1,)](result, BLOCK=4)
        assert result.tolist() == [-72.0, -64.0, -56.0, -48.0]
        assert 1 <= patched.count(tl) / launches <= 2
        assert patched.count(tl.core) <= launches
    assert tl.load.__module__ == "triton.language.core", "as it was before"
