"""Gradients of float32 adapters by the kernels, for losses of any scale: no further from float64
than stock PEFT's, which are computed in float32."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import pytest
import torch
from equation import Case, Operands, exact, fused, make, stock

pytest.importorskip("triton")
import lora_fast
from bench.instruments.accuracy import assert_accurate, assert_same_bits
from lora_fast import functional
from lora_fast.backends import triton_ops
from lora_fast.tuning.plans import HYBRID

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ADAPTERS = ("dA", "dB", "db", "dd", "dg")
# Factors of the loss: one, and those by which gradients shrink in a large batch.
SCALES = [1.0, 2.0**-10, 2.0**-20]

PLAIN = Case(M=70, K=40, N=72, R=16, dtype=FP16, adapter_dtype=FP32, factors=("x", "A", "B"))
# dS is computed by the kernel of dX: the rank is too large for strips to store parts of it.
WIDE = replace(PLAIN, R=80)
CASES = {
    "plain": PLAIN,
    "wide": WIDE,
    "ragged": replace(PLAIN, M=150, K=75, N=131, R=5, x_layout="transposed", dY_layout="sliced"),
    "one row": replace(PLAIN, M=1),
    "B frozen": replace(PLAIN, trains=("x", "A")),
    "only dA": replace(PLAIN, trains=("A",)),
    "nf4": replace(PLAIN, nf4=True),
    "dropout": replace(PLAIN, p=0.3),
    "wide, dropout": replace(WIDE, p=0.3),
    "DoRA": replace(PLAIN, factors=("x", "A", "B", "g")),
    "VeRA": replace(WIDE, factors=("x", "A", "B", "b", "d"), trains=("x", "b", "d")),
    "AdaLoRA": replace(PLAIN, factors=("x", "A", "B", "d")),
    "all factors": replace(WIDE, factors=("x", "A", "B", "b", "d", "g"), p=0.3),
    "mixed batch": replace(PLAIN, spans=((0, 8), (8, 16), (0, 0), (4, 12), (8, 16))),
    "wide mixed batch": replace(WIDE, spans=((0, 16), (64, 80), (0, 0), (16, 64), (16, 80))),
}
# Wide loads and the software pipeline of compiled kernels: parts of dS by strips, and without.
ALIGNED = [
    replace(PLAIN, M=160, K=64, N=128),
    replace(WIDE, M=160, K=64, N=128, factors=("x", "A", "B", "b", "d", "g"), p=0.3),
]


@pytest.fixture
def interpreted() -> Iterator[None]:
    with lora_fast.set_backend("triton"):
        yield


def _with(operands: Operands, scale: float, **sizes: float) -> Operands:
    """dY times `scale`, and factors times a size of their own."""
    with torch.no_grad():
        operands.dY = (operands.dY.double() * scale).to(operands.dY.dtype)
        for name, size in sizes.items():
            operands.tensors[name].mul_(size)
    return operands


def check(operands: Operands, names: Collection[str] = ()) -> None:
    """The rule, with stock PEFT as the bound, for every result or those in `names`."""
    results, ref64, yardstick = fused(operands), exact(operands), stock(operands)
    compared = [n for n, v in results.items() if v is not None and (not names or n in names)]
    assert set(compared) & set(ADAPTERS)
    for name in compared:
        assert_accurate(
            results[name], ref64[name], yardstick[name],
            name=name, compute_dtype=operands.case.dtype,
        )  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["plain", "wide", "dropout", "DoRA"])
def test_a_loss_of_a_large_batch_beside_cublas(interpreted, monkeypatch, name):
    monkeypatch.setattr(triton_ops.tuner, "times", True)
    monkeypatch.setattr(triton_ops.tuner, "plan", lambda *args: HYBRID)
    check(_with(make(CASES[name]), 2.0**-20), ADAPTERS)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_loss_of_a_large_batch(interpreted, case):
    check(_with(make(case), 2.0**-20), ADAPTERS)


@pytest.mark.interpreter
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("case", ["plain", "wide, dropout"])
def test_losses_of_any_scale(interpreted, case, dtype, scale):
    check(_with(make(replace(CASES[case], dtype=dtype)), scale), () if scale == 1.0 else ADAPTERS)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("case", ALIGNED, ids=str)
def test_every_machine(executor, case, scale):
    check(_with(make(case, executor.device), scale, B=1e-3), () if scale == 1.0 else ADAPTERS)


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [1e-4, 1e-7])
@pytest.mark.parametrize("case", ["plain", "wide", "DoRA", "VeRA"])
def test_small_factors(interpreted, case, size):
    """After the first step B, or VeRA's b, is about as large as the learning rate."""
    sizes = {"b" if case == "VeRA" else "B": size}
    check(_with(make(CASES[case]), 1.0, **sizes))
    check(_with(make(CASES[case]), 2.0**-20, **sizes), ADAPTERS)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", ["plain", "dropout", "wide"])
@pytest.mark.parametrize(("A", "B"), [(2.0**8, 2.0**-28), (2.0**-10, 2.0**15)], ids=str)
def test_dX_of_a_dS_that_float16_does_not_hold(interpreted, case, A, B):
    """Without the product with W, which would hide a loss, though not an infinity."""
    operands = make(CASES[case])
    with torch.no_grad():
        operands.dense.zero_()
    check(_with(operands, 1.0, A=A, B=B), names=("dx", "dA"))


@pytest.mark.interpreter
@pytest.mark.parametrize("case", ["plain", "wide", "AdaLoRA"])
def test_columns_of_unlike_size(interpreted, case):
    """Stacked adapters share a product; each keeps gradients of its own size."""
    for scale in SCALES:
        operands = _with(make(CASES[case]), scale)
        half = operands.tensors["A"].shape[0] // 2
        with torch.no_grad():
            operands.tensors["B"][:, :half] *= 2.0**-40
        results, ref64, yardstick = fused(operands), exact(operands), stock(operands)
        for rows in (slice(0, half), slice(half, None)):
            parts = (results["dA"][rows], ref64["dA"][rows], [a[rows] for a in yardstick["dA"]])
            assert_accurate(*parts, name=f"dA of {rows}", compute_dtype=FP16)


@pytest.mark.interpreter
@pytest.mark.parametrize("scale", [1.0, 2.0**-20])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_group_with_a_member_of_small_gradients(interpreted, scale, p):
    cases = [replace(PLAIN, p=p), replace(PLAIN, p=p, N=40, R=8)]
    alone = [_with(make(c), scale, B=size) for c, size in zip(cases, (1.0, 1e-6), strict=True)]
    x = alone[0].tensors["x"]
    members = []
    for operands in alone:
        operands.tensors["x"] = x
        A, B = operands.tensors["A"], operands.tensors["B"]
        members.append(functional.Member(operands.weight, None, A, B, operands.case.scaling))
    ys = functional.adapted_linears(x, members, dropout_p=p, dropout_seed=PLAIN.seed if p else None)
    dAs = torch.autograd.grad(ys, [m.A for m in members], [operands.dY for operands in alone])
    for dA, operands in zip(dAs, alone, strict=True):
        yardstick = exact(operands)["dA"], stock(operands)["dA"]
        assert_accurate(dA, *yardstick, name=str(operands.case), compute_dtype=FP16)


@pytest.mark.interpreter
def test_zero_gradients_are_zero(interpreted):
    """B is zero before the first step, and with it dS."""
    operands = _with(make(replace(PLAIN, p=0.3)), 1.0, B=0.0)
    check(operands)
    assert not fused(operands)["dA"].any()


@pytest.mark.interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", [PLAIN, WIDE], ids=str)
def test_a_row_that_is_not_finite_changes_no_other(interpreted, case, value):
    operands = _with(make(case), 2.0**-10)
    with torch.no_grad():
        operands.tensors["B"].abs_()  # of both signs an infinity would make a dS that is no number
    expected = fused(operands)["dx"]
    with torch.no_grad():
        operands.dY[5] = value
    found = fused(operands)["dx"]
    others = torch.arange(case.M) != 5
    assert not found[5].isfinite().any()
    assert_same_bits(found[others], expected[others], name="dx")


def test_scaling_takes_no_launch(interpreter_or_gpu):
    operands = make(PLAIN, interpreter_or_gpu.device)
    with interpreter_or_gpu.counting_launches() as names:
        fused(operands)
    assert names == ["ticketed_gemm", "strips", "ticketed_gemm", "strips"]


def test_two_runs_and_every_schedule_give_the_same_bits(ptx_executor):
    operands = _with(make(replace(CASES["all factors"], M=200)), 2.0**-10)
    expected = fused(operands)
    with ptx_executor.with_options(schedule="random:5", resident=3):
        results = fused(operands)
    for name, value in expected.items():
        assert_same_bits(results[name], value, name=name)
