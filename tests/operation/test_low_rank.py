"""The low rank on the output of an opaque base, by every backend, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from machines import MACHINES, started
from torch import Tensor

import lora_fast
from bench.instruments.accuracy import assert_all_accurate, assert_same_bits, orders
from lora_fast.backends.selection import backend_for
from lora_fast.factors import NO_WEIGHT, Constants, Factors
from lora_fast.operation.low_rank import add_low_rank
from lora_fast.operation.seeds import draw_seed

N, K, R, S = 44, 52, 5, 1.5
BF16, FP32 = torch.bfloat16, torch.float32
# name: shape of x before K, and what differs from a plain call
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout and bias": {"shape": (2, 17), "bias": True, "p": 0.25},
    "in place": {"dtype": BF16, "in_place": True},
    "in place, few rows": {"shape": (3, 3), "dtype": BF16, "in_place": True},
    "in place, wide adapters": {"dtype": BF16, "p": 0.25, "in_place": True, "adapters": FP32},
    "wide y": {"dtype": BF16, "y_dtype": FP32},
    "spans": {"shape": (4, 9), "spans": [(0, 2), (2, 5), (0, 0), (1, 2)]},
    "gains": {"gains": True, "dtype": BF16},
    "without y": {"alone": True, "dtype": BF16, "bias": True},
    "no rows": {"shape": (0,), "p": 0.25},
}
BACKENDS = [
    pytest.param(None, id="torch"),
    # The kernels have their own tests, which execute their PTX.
    *(
        pytest.param(machine, id=name, marks=marks)
        for name, machine, marks in MACHINES
        if not name.startswith("sm_")
    ),
]

# What differs between the kernels' variants; not every one on every architecture in every run.
PTX_CASES = ("dropout and bias", "in place, wide adapters", "spans", "gains")
PTX = [
    pytest.param(
        machine,
        case,
        id=f"{name}-{case}",
        marks=marks
        if case == PTX_CASES[0] or name == "sm_90"
        else [*marks, pytest.mark.exhaustive],
    )
    for name, machine, marks in MACHINES
    for case in PTX_CASES
    if name.startswith("sm_")
]


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param is None:
        with lora_fast.set_backend("torch"):
            yield torch.device("cpu")
        return
    with started(request.param()) as machine:
        yield machine.device


def operands(device: torch.device, case: dict[str, Any]) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    dtype = case.get("dtype", FP32)
    narrow, shape = case.get("adapters", dtype), case.get("shape", (70,))

    def normal(*size: int, dtype: torch.dtype = narrow) -> Tensor:
        values = torch.randn(size, generator=generator)
        return values.to(device, dtype).requires_grad_()

    return {
        "y": None if case.get("alone") else normal(*shape, N, dtype=case.get("y_dtype", dtype)),
        "x": normal(*shape, K, dtype=dtype),
        "bias": normal(N) if case.get("bias") else None,
        "A": normal(R, K),
        "B": normal(N, R),
        "b": normal(N) if case.get("gains") else None,
        "d": normal(R) if case.get("gains") else None,
    }


def spans_of(case: dict[str, Any], device: torch.device) -> Tensor | None:
    spans = case.get("spans")
    return None if spans is None else torch.tensor(spans, dtype=torch.int32, device=device)


def with_gradients(out: Tensor, tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    dY = torch.randn(out.shape, generator=generator).bfloat16().to(out.device, out.dtype)
    named = {name: t for name, t in tensors.items() if t is not None}
    grads = torch.autograd.grad(out, list(named.values()), dY, allow_unused=True)
    return {"out": out.detach(), **dict(zip(named, grads, strict=True))}


def plain(
    tensors: dict[str, Tensor | None], keep: Tensor, case: dict[str, Any]
) -> dict[str, Tensor | None]:
    """The equation in PyTorch, in the dtypes of its operands."""
    y, x, bias, A, B, b, d = tensors.values()
    assert x is not None and A is not None and B is not None
    S_ = (x * keep) @ A.to(x.dtype).T
    if case.get("spans"):
        columns = torch.arange(R, device=x.device)
        inside = [(columns >= start) & (columns < stop) for start, stop in case["spans"]]
        S_ = S_ * torch.stack(inside).unsqueeze(1)
    S_ = S_ if d is None else S_ * d
    part = S_ @ B.to(x.dtype).T * S
    part = part if b is None else part * b
    part = part if bias is None else part + bias
    return with_gradients(part.to(x.dtype) if y is None else (y + part).to(y.dtype), tensors)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_accuracy(device: torch.device, case: dict[str, Any]) -> None:
    check(device, case)


@pytest.mark.parametrize(("machine", "name"), PTX)
def test_compiled(machine: Any, name: str) -> None:
    """The PTX of every launch, with its races looked for, and in the opposite order of programs."""
    with started(machine()) as running:
        forward = check(running.device, CASES[name])
        with running.with_options(schedule="reverse"):
            backward = check(running.device, CASES[name])
    for key, value in forward.items():
        assert value is not None and backward[key] is not None
        assert_same_bits(backward[key], value, name=key)


def check(device: torch.device, case: dict[str, Any]) -> dict[str, Tensor | None]:
    """y and all gradients obey the rule, and are the same a second time."""
    tensors, p = operands(device, case), case.get("p", 0.0)
    y, x, bias, A, B, b, d = tensors.values()
    assert x is not None
    torch.manual_seed(3)
    seed = draw_seed(device)
    rows = x.numel() // K
    mask = backend_for(device).dropout_mask(seed, rows, K, p, device) if p else None
    keep = torch.ones_like(x) if mask is None else mask.view(x.shape) / (1 - p)
    constants = Constants(S, p, 0, spans_of(case, device))
    f = Factors(NO_WEIGHT, bias, A, B, b, d, None, constants)

    def run() -> dict[str, Tensor | None]:
        torch.manual_seed(3)
        before = None if y is None else y.clone()
        out = add_low_rank(before, x, f, in_place=case.get("in_place", False))
        assert (out is before) is case.get("in_place", False)
        return with_gradients(out, tensors)

    actual = run()
    wide = {
        name: None if t is None else t.detach().double().requires_grad_()
        for name, t in tensors.items()
    }
    ref64 = plain(wide, keep.double(), case)
    eager = orders(lambda: plain(tensors, keep.to(x.dtype), case))
    like = {"out": x if y is None else y, **tensors}
    for name, value in actual.items():
        other = like[name]
        assert value is not None and other is not None and value.dtype == other.dtype, name
    if rows:
        assert_all_accurate(actual, ref64, eager, compute_dtype=x.dtype)
    again = run()
    for name, value in actual.items():
        assert value is not None and again[name] is not None
        assert_same_bits(again[name], value, name=name)
    return actual


def test_what_needs_no_gradient_gets_none_and_twice_is_refused() -> None:
    x, A, B = torch.randn(6, K), torch.randn(R, K), torch.randn(N, R, requires_grad=True)
    f = Factors(NO_WEIGHT, None, A, B, None, None, None, Constants(S))
    y = add_low_rank(torch.zeros(6, N), x, f)
    saved = [t.shape for t in y.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    assert saved == [(6, R), (R, K), (N, R)], "x is saved for A alone"
    (dB,) = torch.autograd.grad(y.square().sum(), [B], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dB.sum().backward()
    assert torch.equal(add_low_rank(torch.zeros(6, N), x, f).detach(), y.detach())
