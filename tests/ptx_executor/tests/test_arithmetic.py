"""The PTX executor's arithmetic, conversions and reductions against torch, in generated kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.instruments.accuracy import assert_accurate

pytest.importorskip("triton")

pytestmark = pytest.mark.compiled

N, BLOCK = 500, 128
INTS = ["int8", "uint8", "int16", "int32", "int64"]
FLOATS = ["float16", "bfloat16", "float32", "float64"]
Reference = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

SOURCE = """import triton
import triton.language as tl
from triton.language.extra import libdevice

@triton.jit
def elementwise(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x_ptr + i, mask=i < n, other=0)
    b = tl.load(y_ptr + i, mask=i < n, other=0)
"""
STORE = "    tl.store(out_ptr + {} * n + i, {}, mask=i < n)\n"


def each(names: list[str], usual: str) -> list[object]:
    """Types, of which all but one are exhaustive."""
    rest = pytest.mark.exhaustive
    return [pytest.param(name, marks=[] if name == usual else [rest]) for name in names]


def numbers(name: str) -> torch.Tensor:
    dtype = getattr(torch, name)
    if dtype.is_floating_point:
        return (torch.randn(N, dtype=torch.float64) * 3).to(dtype)
    info = torch.iinfo(dtype)
    return torch.randint(max(info.min, -(2**40)), min(info.max, 2**40), (N,)).to(dtype)


@pytest.fixture
def computed(sm: int, tmp_path: Path) -> Callable[..., torch.Tensor]:
    """Function (expressions in a and b, x, y, dtype) → the results of one kernel, a row each."""

    def compute(expressions, x, y, dtype):
        lines = [STORE.format(row, text) for row, text in enumerate(expressions)]
        path = tmp_path / "generated.py"
        path.write_text(SOURCE + "".join(lines))
        spec = importlib.util.spec_from_file_location(f"generated_{tmp_path.name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        out = torch.empty(len(lines), N, dtype=dtype)
        module.elementwise[((N + BLOCK - 1) // BLOCK,)](x, y, out, N, BLOCK=BLOCK)
        return out

    return compute


@pytest.fixture
def check(computed: Callable[..., torch.Tensor]) -> Callable[..., None]:
    """Function ({expression: the same in torch}, types of a, b and the result): equal values."""

    def equal(cases: dict[str, Reference], a: str, b: str, to: str) -> None:
        x, y, dtype = numbers(a), numbers(b), getattr(torch, to)
        for text, row in zip(cases, computed(cases, x, y, dtype), strict=True):
            expected = cases[text](x, y).to(dtype)
            assert torch.equal(row.nan_to_num(), expected.nan_to_num()), (text, a, b, to)

    return equal


@pytest.fixture
def check_rounded(computed: Callable[..., torch.Tensor]) -> Callable[..., None]:
    """The same for functions that hardware approximates, by the rule of accuracy.py.

    Arguments are below 1, where their own rounding does not show in the result; float64 is
    compared in float32, whose error the rule knows.
    """

    def close(cases: dict[str, Reference], name: str) -> None:
        x, y = numbers(name).tanh(), numbers(name).tanh()
        for text, row in zip(cases, computed(cases, x, y, x.dtype), strict=True):
            exact, eager = cases[text](x.double(), y.double()), cases[text](x, y)
            if name == "float64":
                row, eager = row.float(), eager.float()
            assert_accurate(row, exact, eager, name=f"{text} in {name}")

    return close


@pytest.mark.parametrize("name", each(FLOATS, "bfloat16"))
def test_float_arithmetic(check, check_rounded, name):
    cases = {
        "a + b": lambda x, y: x + y,
        "a - b": lambda x, y: x - y,
        "a * b": lambda x, y: x * y,
        "tl.minimum(a, b)": torch.minimum,
        "tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)": torch.maximum,
        "tl.where(a < b, a, b + 1)": lambda x, y: torch.where(x < y, x, y + 1),
        "tl.abs(a) - (-b)": lambda x, y: x.abs() + y,
    }
    if name != "float64":
        cases["tl.clamp(a, -1.0, 1.0)"] = lambda x, y: x.clamp(-1, 1)
    check(cases, name, name, name)
    check_rounded(
        {
            "a / (tl.abs(b) + 1)": lambda x, y: x / (y.abs() + 1),
            "tl.fma(a, b, a)": lambda x, y: x * y + x,
        },
        name,
    )


FUNCTIONS = ["exp", "exp2", "log", "log2", "sin", "cos", "sqrt", "rsqrt", "erf", "floor", "ceil"]


@pytest.mark.parametrize("name", each(["float32", "float64"], "float32"))
def test_functions(check_rounded, name):
    cases = {
        f"tl.{function}(tl.abs(a) + 0.5)": lambda x, y, f=function: getattr(torch, f)(x.abs() + 0.5)
        for function in FUNCTIONS
    }
    check_rounded(cases, name)


def test_functions_of_libdevice(check, check_rounded):
    check_rounded(
        {
            "libdevice.tanh(a)": lambda x, y: x.tanh(),
            "libdevice.pow(tl.abs(a) + 0.5, b)": lambda x, y: (x.abs() + 0.5) ** y,
            "tl.sigmoid(a)": lambda x, y: x.sigmoid(),
        },
        "float32",
    )
    check(
        {
            "tl.sqrt_rn(tl.abs(a))": lambda x, y: x.double().abs().sqrt(),
            "tl.div_rn(a, b)": lambda x, y: x / y,
            "libdevice.rint(a)": lambda x, y: x.round(),
        },
        *("float32",) * 3,
    )
    check(
        {"a.to(tl.int32, bitcast=True)": lambda x, y: x.view(torch.int32)},
        *("float32", "float32", "int32"),
    )


def _high_product(x, y):
    x, y = x.long() % 2**32, y.long() % 2**32
    return (x * (y >> 16) + (x * (y % 2**16) >> 16)) >> 16


def test_high_products(check):
    check({"tl.umulhi(a, b)": _high_product}, *("int32",) * 3)


@pytest.mark.parametrize("name", each(INTS, "int32"))
def test_integer_arithmetic(check, name):
    check(
        {
            "a + b": lambda x, y: x + y,
            "a - b": lambda x, y: x - y,
            "a * b": lambda x, y: x * y,
            "a & b": lambda x, y: x & y,
            "a | b": lambda x, y: x | y,
            "a ^ b": lambda x, y: x ^ y,
            "a << (b & 7)": lambda x, y: x << (y & 7),
            "a >> (b & 7)": lambda x, y: x >> (y & 7),
            "a // (b | 1)": lambda x, y: torch.div(x, y | 1, rounding_mode="trunc"),
            "a % (b | 1)": lambda x, y: torch.fmod(x, y | 1),
            "tl.minimum(a, b)": torch.minimum,
            "tl.maximum(a, b)": torch.maximum,
            "(~a) + (-b)": lambda x, y: ~x - y,
        },
        *(name,) * 3,
    )


@pytest.mark.parametrize("source", each(INTS + FLOATS, "float32"))
def test_casts(check, source):
    for target in INTS + FLOATS:
        if source in FLOATS and target in ("int8", "uint8"):
            cases = {f"tl.abs(a * 4).to(tl.{target})": lambda x, y: (x * 4).abs().long()}
        elif source in FLOATS and target in INTS:
            cases = {f"(a * 4).to(tl.{target})": lambda x, y: (x * 4).long()}
        elif source in ("int32", "int64") and target == "float16":
            # Beyond float16's range, and rounded by way of float32: powers of two are neither.
            cases = {"tl.where(a < b, 1024, -2).to(tl.float16)": _power_of_two}
        elif target == "bfloat16":
            cases = {"a.to(tl.bfloat16)": lambda x, y: x.float()}
        else:
            cases = {f"a.to(tl.{target})": lambda x, y: x}
        if source != target and not (source == "int64" and target == "bfloat16"):
            check(cases, source, source, target)


def _power_of_two(x, y):
    return torch.where(x < y, 1024, -2)


@pytest.mark.parametrize("name", each(FLOATS[:3], "float32"))
def test_fp8(check, sm, name):
    kinds = {"float8e5": torch.float8_e5m2}
    if sm >= 90:
        kinds["float8e4nv"] = torch.float8_e4m3fn
    elif name != "float32":
        pytest.skip("for sm_80 Triton's own code rounds ties of 16-bit values away from zero")
    cases = {
        f"a.to(tl.{kind}).to(tl.{name})": lambda x, y, dtype=dtype: x.to(dtype).to(x.dtype)
        for kind, dtype in kinds.items()
    }
    check(cases, *(name,) * 3)


def _blocks(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.zeros(-N % BLOCK, dtype=x.dtype)]).reshape(-1, BLOCK)


def test_collectives(check):
    check(
        {
            "tl.sort(tl.where(i < n, a, 1000.0))": lambda x, y: torch.cat(
                [block.sort()[0] for block in x.split(BLOCK)]
            ),
            "tl.flip(a, 0)": lambda x, y: _blocks(x).flip(1).reshape(-1)[:N],
            "tl.gather(a, b & 127, 0)": lambda x, y: torch.gather(
                _blocks(x), 1, (_blocks(y) & 127).long()
            ).reshape(-1)[:N],
        },
        *("float32", "int32", "float32"),
    )
    check(
        {
            "tl.cumsum(a, 0)": lambda x, y: _blocks(x).cumsum(1).reshape(-1)[:N],
            "tl.histogram(a & 31, 128)": lambda x, y: torch.cat(
                [torch.bincount((block & 31).long(), minlength=BLOCK) for block in _blocks(x)]
            )[:N],
        },
        *("int32",) * 3,
    )
