"""The weight update kernel against float64: interpreted, compiled and executed, or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from equation import lay_out

from bench.instruments.accuracy import assert_accurate, assert_same_bits, orders
from lora_fast.backends.protocol import Backend
from lora_fast.backends.selection import backend_for
from lora_fast.backends.torch_ops import TORCH

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One weight and its factors; `layout` is that of W and of the result."""

    N: int = 45
    K: int = 139
    R: int = 5
    dtype: torch.dtype = BF16
    adapter_dtype: torch.dtype = FP32
    layout: str = "contiguous"
    vectors: str = ""
    in_place: bool = True
    scaling: float = 0.7

    def __str__(self) -> str:
        names = [str(d).removeprefix("torch.") for d in (self.dtype, self.adapter_dtype)]
        names += [f"{self.N}x{self.K}", f"R{self.R}", self.vectors, self.layout]
        return "-".join(filter(None, [*names, "" if self.in_place else "out"]))


CASES = [
    Case(vectors="bdg"),
    Case(R=80, dtype=FP32, vectors="g"),
    Case(N=32, K=128, R=16, dtype=FP16, in_place=False),
    Case(R=1, adapter_dtype=BF16, layout="transposed"),
    Case(R=0, vectors="g", layout="sliced", dtype=FP16),
    Case(R=8, dtype=FP32, adapter_dtype=FP16, in_place=False, vectors="bd"),
    Case(R=12, adapter_dtype=BF16),
]


def make(case: Case, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Operands by name, W among them."""
    torch.manual_seed(0)
    shapes = {"A": (case.R, case.K), "B": (case.N, case.R)} if case.R else {}
    shapes |= {
        name: {"b": (case.N,), "d": (case.R,), "g": (case.N,)}[name] for name in case.vectors
    }
    factors = {
        name: torch.randn(shape).to(case.adapter_dtype).to(device) for name, shape in shapes.items()
    }
    W = lay_out(torch.randn(case.N, case.K).to(case.dtype).to(device), case.layout)
    return {"W": W, **factors, "scaling": case.scaling}


def specified(operands: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """The equation with every product and sum in `dtype`."""
    o = {k: t.cpu().to(dtype) if isinstance(t, torch.Tensor) else t for k, t in operands.items()}
    total = o["W"]
    if "A" in o:
        left = o["B"] * o["d"] if "d" in o else o["B"]
        left = left * o["b"][:, None] if "b" in o else left
        total = total + o["scaling"] * (left @ o["A"])
    return total * o["g"][:, None] if "g" in o else total


def update(operands: dict[str, Any], out: torch.Tensor) -> torch.Tensor:
    factors = dict(operands)
    backend_for(out.device).update_weight(factors.pop("W"), out, **factors)
    return out


def updated(operands: dict[str, Any], case: Case) -> torch.Tensor:
    """The result of the current backend; W does not change unless it is the result."""
    W = operands["W"]
    if case.in_place:
        return update(operands, W)
    before = W.clone()
    out = update(operands, torch.empty_like(W))
    assert_same_bits(W, before, name="W")
    return out


def check(case: Case, device: torch.device | str = "cpu") -> None:
    operands = make(case, device)
    exact = specified(operands, torch.float64)
    eager = orders(lambda: specified(operands, FP32).to(case.dtype))
    assert_accurate(updated(operands, case), exact, eager, name=str(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_equation(executor, case):
    with executor.counting_launches() as names:
        check(case, executor.device)
    assert names == ["weight_update"]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_rounds_once_and_to_nearest(typical_executor, dtype):
    """All but near-ties are the nearest neighbours of the exact sum: no factor is rounded."""
    operands = make(Case(dtype=dtype, R=16, N=33, K=70), typical_executor.device)
    exact = specified(operands, torch.float64)
    out = update(operands, operands["W"])
    wrong = out.cpu() != exact.to(FP32).to(dtype)
    assert wrong.double().mean() < 1e-3


def test_a_delta_that_nearly_cancels(executor):
    """B₁A₁ − B₀A₀ of factors that moved by 2⁻¹² of themselves: 16-bit products would be noise."""
    o = make(Case(R=8, dtype=FP32, scaling=1.0), executor.device)
    A, B, start = o["A"], o["B"], torch.zeros_like(o["W"])
    A1, B1 = A * (1 + 2**-12), B * (1 - 2**-11)
    stacked = {"W": start, "A": torch.cat([A1, A]), "B": torch.cat([B1, -B], dim=1)}
    exact = (B1.double() @ A1.double() - B.double() @ A.double()).cpu()
    error = update(stacked, start).double().cpu() - exact
    assert error.norm() < 1e-3 * exact.norm()


def test_two_runs_give_the_same_bits(interpreter_or_gpu):
    case = Case(R=40, vectors="bdg")
    first, second = (updated(make(case, interpreter_or_gpu.device), case) for _ in range(2))
    assert_same_bits(first, second, name="out")


def test_not_finite_stays_in_its_row(typical_executor):
    operands = make(Case(R=8), typical_executor.device)
    operands["B"][7, 2] = float("nan")
    bad = ~update(operands, operands["W"]).isfinite().cpu()
    assert bad[7].all() and bad.sum() == bad.shape[1]


def test_autograd_notices_the_overwriting(typical_executor):
    operands = make(Case(dtype=FP32), typical_executor.device)
    W = operands["W"]
    y = torch.randn(3, W.shape[1], device=W.device, requires_grad=True) @ W.T
    update(operands, W)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class TestTorchBackend:
    """The same cases without Triton."""

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_agrees_with_the_equation(self, case: Case) -> None:
        check(case)

    def test_row_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lora_fast.backends import torch_ops

        monkeypatch.setattr(torch_ops, "_UPDATE_ELEMENTS", 500)
        for case in CASES:
            check(case)

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    def test_float64_is_not_narrowed(self, backend: str) -> None:
        """Neither by the backend whose kernels have no float64, which needs no driver for it."""
        operands = make(Case(dtype=torch.float64, adapter_dtype=torch.float64, vectors="bdg"))
        exact = specified(operands, torch.float64)
        chosen: Backend = TORCH
        if backend == "triton":
            from lora_fast.backends.triton_ops import TritonBackend

            chosen = TritonBackend(cublas=False)
        out = operands.pop("W")
        chosen.update_weight(out, out, **operands)
        assert (out - exact).abs().max() < 1e-13
