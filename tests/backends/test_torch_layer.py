"""One row on a CPU: operations that autograd records by itself, where nothing else is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_models import K, accelerated_copy, compare, counted, peft_model
from machines import multiplying

import lora_fast
from bench.instruments.accuracy import assert_same_bits
from lora_fast import NF4Weight
from lora_fast.backends import torch_layer
from lora_fast.factors import Constants, Factors

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize("adapter_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_as_stock(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    stock = peft_model("dense", dtype, adapter_dtype)
    fused = accelerated_copy(stock)
    x = torch.randn(1, 1, K).to(dtype)
    compare(fused, stock, x, compute_dtype=dtype)
    assert counted(fused)[1] == {}


def factors(**changes: Any) -> Factors:
    found = {"weight": torch.randn(6, K), "A": torch.randn(3, K), "B": torch.randn(6, 3)}
    constants = Constants(changes.pop("scaling", 2.0), changes.pop("p", 0.0))
    return Factors(**{**found, **changes}, constants=constants)


OTHERS = {
    "no A": {"A": None, "B": None},
    "A in 16 bits": {"A": torch.randn(3, K, dtype=BF16)},
    "B in 16 bits": {"B": torch.randn(6, 3, dtype=BF16)},
    "gain": {"g": torch.randn(6)},
    "diagonals": {"b": torch.randn(6), "d": torch.randn(3)},
    "dropout": {"p": 0.1},
    "scaling in a tensor": {"scaling": torch.tensor(2.0)},
    "weight of another dtype": {"weight": torch.randn(6, K, dtype=BF16)},
    "bias of another dtype": {"bias": torch.randn(6, dtype=BF16)},
    "4 bits": {"weight": NF4Weight.from_dense(torch.randn(6, 64))},
}


def test_what_is_one_operation_all_the_same() -> None:
    x = torch.randn(1, K)
    assert torch_layer.row_on_a_cpu(x, factors()) is not None
    for name, changes in OTHERS.items():
        assert torch_layer.row_on_a_cpu(x, factors(**changes)) is None, name
    with torch.autocast("cpu", BF16):
        assert torch_layer.row_on_a_cpu(x, factors()) is None
    half = x.to(BF16), factors(weight=torch.randn(6, K, dtype=BF16))
    for dtypes in ((), (BF16,)):
        with multiplying(dtypes):
            assert (torch_layer.row_on_a_cpu(*half) is None) == (not dtypes)


def test_no_python_runs_in_its_backward_pass() -> None:
    f, x = factors(), torch.randn(1, K, requires_grad=True)
    (y,) = lora_fast.operation.autograd.run(x, [f])
    assert type(y.grad_fn).__module__ != lora_fast.operation.autograd.__name__
    assert "AdaptedLinears" not in type(y.grad_fn).__name__
    two = torch.cat([x, x]).detach().requires_grad_()
    (of_two,) = lora_fast.operation.autograd.run(two, [f])
    assert "AdaptedLinears" in type(of_two.grad_fn).__name__
    with torch.no_grad():
        assert_same_bits(lora_fast.operation.autograd.run(x, [f])[0], y.detach(), name="y")
