"""A plain layer of few rows on a CPU: values, gradients, what is saved, and for what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_models import K, accelerated_copy, compare, counted, peft_model
from machines import multiplying
from torch import Tensor

from bench.instruments.accuracy import assert_all_accurate, assert_same_bits, orders
from lora_fast import NF4Weight
from lora_fast.backends.torch_dropout import dropout_mask
from lora_fast.backends.torch_few_rows import _NARROW_ROWS, FEW_ROWS, covers, gradients, output
from lora_fast.factors import Constants, Factors

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
R, N, ALL = 3, 6, (True, True, True)
ROWS = (1, 2, _NARROW_ROWS, _NARROW_ROWS + 1, FEW_ROWS)


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize("adapter_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_as_stock(rows: int, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    stock = peft_model("dense", dtype, adapter_dtype)
    fused = accelerated_copy(stock)
    compare(fused, stock, torch.randn(1, rows, K).to(dtype), compute_dtype=dtype)
    compare(fused, stock, torch.randn(K, rows).to(dtype).T, compute_dtype=dtype)
    assert counted(fused) == (2, {})


def factors(dtype: torch.dtype = FP32, adapters: torch.dtype = FP32, **changes: Any) -> Factors:
    found = {
        "weight": torch.randn(N, K, dtype=dtype),
        "bias": torch.randn(N, dtype=dtype),
        "A": torch.randn(R, K, dtype=adapters),
        "B": torch.randn(N, R, dtype=adapters),
    }
    constants = Constants(changes.pop("scaling", 1.7), changes.pop("p", 0.0))
    return Factors(**{**found, **changes}, constants=constants)


def in_torch(x: Tensor, f: Factors, kept: Tensor, dY: Tensor, wide: torch.dtype) -> Any:
    """y and the gradients of x, A and B by autograd, as PEFT computes them in these dtypes."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, f.A, f.B)]
    x, A, B = leaves
    dropped = x.to(wide) * kept / (1 - f.constants.dropout_p)
    linear = torch.nn.functional.linear
    low = linear(linear(dropped, A.to(wide)), B.to(wide)) * f.constants.scaling
    y = (linear(x, f.weight, f.bias) + low).to(x.dtype)
    names = ("y", "x", "A", "B")
    return dict(zip(names, (y.detach(), *torch.autograd.grad(y, leaves, dY)), strict=True))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("adapters", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("M", ROWS)
def test_equation(M: int, dtype: torch.dtype, adapters: torch.dtype, p: float) -> None:
    f, seed = factors(dtype, adapters, p=p), 12345678901
    x, dY = torch.randn(M, K, dtype=dtype), torch.randn(M, N, dtype=dtype)
    kept = dropout_mask(seed, M, K, p, "cpu")
    with multiplying((BF16,)):
        assert covers(x, f)
        y, saved = output(x, f, seed, ALL)
        found = gradients(dY, saved, f.constants, adapters)
    actual = dict(zip(("y", "x", "A", "B"), (y, *found), strict=True))
    wide = f._replace(**{n: t.double() for n, t in f._asdict().items() if isinstance(t, Tensor)})
    ref64 = in_torch(x.double(), wide, kept, dY.double(), torch.float64)
    eager = orders(lambda: in_torch(x, f, kept, dY, adapters))
    assert_all_accurate(actual, ref64, eager, compute_dtype=dtype)
    assert [t.dtype for t in found if t is not None] == [dtype, adapters, adapters]


def test_nothing_is_kept_of_dropout_that_drops_all() -> None:
    f, x = factors(p=1.0), torch.randn(4, K)
    y, saved = output(x, f, 1, ALL)
    dX, dA, dB = gradients(torch.ones(4, N), saved, f.constants, FP32)
    assert_same_bits(y, torch.nn.functional.linear(x, f.weight, f.bias), name="y")
    assert dX is not None and dX.any()
    assert dA is not None and dB is not None and not dA.any() and not dB.any()


NEEDED = {
    "x A B": ({"x", "S", "W", "A", "B"}, {"mask"}),
    "x B": ({"S", "W", "A", "B"}, {"mask"}),
    "A B": ({"x", "S", "B"}, set()),
    "B": ({"S"}, set()),
    "x": ({"W", "A", "B"}, {"mask"}),
    "": (set(), set()),
}


@pytest.mark.parametrize("needed", NEEDED)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_what_is_saved(p: float, needed: str) -> None:
    """What the required gradients read, and no gradient that is not required."""
    names = ("x", "A", "B")
    f, x = factors(p=p), torch.randn(5, K)
    always, if_dropped = NEEDED[needed]
    _, saved = output(x, f, 1, tuple(n in needed.split() for n in names))  # type: ignore[arg-type]
    assert {n for n, t in saved._asdict().items() if t is not None} == always | (
        if_dropped if p else set()
    )
    assert saved.x is None or (saved.x is x) == (p == 0.0)
    found = gradients(torch.randn(5, N), saved, f.constants, FP32)
    assert {n for n, t in zip(names, found, strict=True) if t is not None} == set(needed.split())


OTHERS = {
    "no A": {"A": None, "B": None},
    "A in 16 bits": {"A": torch.randn(R, K, dtype=BF16)},
    "adapters in float16": {"adapters": FP16},
    "adapters in float64": {"adapters": torch.float64},
    "gain": {"g": torch.randn(N)},
    "diagonals": {"b": torch.randn(N), "d": torch.randn(R)},
    "scaling in a tensor": {"scaling": torch.tensor(2.0)},
    "weight of another dtype": {"weight": torch.randn(N, K, dtype=BF16)},
    "bias of another dtype": {"bias": torch.randn(N, dtype=BF16)},
    "bias that trains": {"bias": torch.randn(N, requires_grad=True)},
    "weight that trains": {"weight": torch.randn(N, K, requires_grad=True)},
    "4 bits": {"weight": NF4Weight.from_dense(torch.randn(N, 64))},
}


def test_what_takes_the_way_of_many_rows() -> None:
    x = torch.randn(FEW_ROWS, K)
    assert covers(x, factors())
    assert not covers(torch.randn(FEW_ROWS + 1, K), factors())
    assert not covers(torch.randn(0, K), factors())
    for name, changes in OTHERS.items():
        assert not covers(x, factors(**changes)), name
    for dtypes in ((), (BF16,), (BF16, FP16)):
        with multiplying(dtypes):
            assert covers(x.to(BF16), factors(BF16)) == bool(dtypes)
            assert not covers(x.to(FP16), factors(FP16))
