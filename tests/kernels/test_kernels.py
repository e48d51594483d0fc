"""The kernels against the float64 reference: interpreted, compiled and executed, or on a GPU."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from equation import (
    Case,
    check,
    check_rows_keep_apart,
    eager,
    exact,
    fused,
    lay_out,
    make,
)
from group_checks import check as check_group
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import lora_fast
from bench.instruments.accuracy import assert_all_accurate, assert_same_bits
from lora_fast import functional
from lora_fast.backends.selection import backend_for
from tests.ptx_executor import GlobalRace

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GAINS = ("x", "bias", "A", "B", "b", "d", "g")

# Ragged in every dimension, more than one tile of rows and of columns, several row ranges.
RAGGED = Case(M=150, K=72, N=136, dtype=BF16, adapter_dtype=FP32)

# Multiples of 16 everywhere: wide loads, asynchronous copies and the software pipeline.
ALIGNED = replace(RAGGED, M=160, K=128, N=256, R=16, factors=("x", "A", "B"))

# What is executed for every architecture; MORE_CASES are for one of them.
CASES = [
    RAGGED,
    replace(RAGGED, K=75, N=131, M=33, R=8, x_layout="transposed", dY_layout="sliced"),
    replace(RAGGED, M=70, dtype=FP32, adapter_dtype=None, p=0.3125, factors=GAINS, nf4=True),
    replace(ALIGNED, factors=("x", "bias", "A", "B"), adapter_dtype=None, nf4=True),
    replace(ALIGNED, factors=GAINS, R=80),
    replace(ALIGNED, p=0.3, R=64),
]
MORE_CASES = [
    replace(RAGGED, R=1),
    replace(RAGGED, R=8),
    replace(RAGGED, R=12, K=75, N=131, factors=GAINS),
    replace(RAGGED, R=24, p=0.3),
    replace(RAGGED, R=4, dtype=FP16, adapter_dtype=None),
    replace(RAGGED, R=100),
    replace(RAGGED, dtype=FP16, adapter_dtype=None, nf4=True, nested=False),
    replace(RAGGED, dtype=FP32, adapter_dtype=None, M=35, R=100, dY_layout="transposed"),
    replace(ALIGNED, R=80, spans=((0, 16), (64, 80), (0, 0), (16, 64))),
    replace(RAGGED, M=1, factors=("x", "A", "B")),
    replace(ALIGNED, M=129, x_layout="sliced", dY_layout="zero-stride"),
    replace(ALIGNED, dtype=FP16, adapter_dtype=None, trains=("A", "B")),
    replace(ALIGNED, dtype=FP32, adapter_dtype=None, M=72),
    replace(ALIGNED, trains=("x",), dY_layout="transposed"),
    replace(ALIGNED, factors=("x", "g")),
    replace(RAGGED, p=0.3, R=13, spans=((0, 5), (5, 13), (5, 13)), nf4=True),
    replace(ALIGNED, dtype=FP32, adapter_dtype=None, M=72, R=40, spans=((8, 40), (0, 8))),
]

LAUNCHES = ["ticketed_gemm"], ["strips", "ticketed_gemm", "strips"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(executor, case):
    check(case, executor.device)


@pytest.mark.parametrize("case", MORE_CASES, ids=str)
def test_agrees_with_the_reference_in_rarer_cases(typical_executor, case):
    check(case, typical_executor.device)


def test_vectors_may_have_any_stride(typical_executor):
    """Sliced bias and d, an expanded b (what a scaling tensor becomes) and a g of stride 2."""
    operands = make(replace(RAGGED, M=40, factors=GAINS), typical_executor.device)
    for name in ("bias", "b", "d", "g"):
        values = operands.tensors[name].detach()
        strided = values[:1].expand_as(values) if name == "b" else lay_out(values, "sliced")
        operands.tensors[name] = strided.requires_grad_()
    results = fused(operands)
    assert_all_accurate(
        results, exact(operands), eager(operands), compute_dtype=BF16, name="strided"
    )


def test_small_factors_in_float16(typical_executor):
    """The first steps of training: s · B far below the smallest normal float16."""
    case = replace(ALIGNED, dtype=FP16, adapter_dtype=None, scaling=1 / 16, M=64)
    operands = make(case, typical_executor.device)
    with torch.no_grad():
        operands.tensors["B"].mul_(1e-4)
    for trains in (("x", "A", "B"), ("x", "A")):
        for name, value in operands.tensors.items():
            value.requires_grad_(name in trains)
        assert_all_accurate(
            fused(operands), exact(operands), eager(operands), compute_dtype=FP16, name="small"
        )


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_launches(interpreter_or_gpu, nf4):
    operands = make(replace(RAGGED, M=64, nf4=nf4), interpreter_or_gpu.device)
    with interpreter_or_gpu.counting_launches() as names:
        fused(operands)
    forward, backward = LAUNCHES
    assert names == [*forward, *backward]


def test_two_runs_give_the_same_bits(interpreter_or_gpu):
    operands = make(replace(ALIGNED, M=300, R=80, factors=GAINS), interpreter_or_gpu.device)
    first, second = fused(operands), fused(operands)
    for name in first:
        assert_same_bits(first[name], second[name], name=name)


SCHEDULES = {
    "reverse-resident1": {"schedule": "reverse", "resident": 1},
    "reverse": {"schedule": "reverse"},
    "random-resident3": {"schedule": "random:7", "resident": 3},
}


def _schedules():
    """One CTA at a time for all cases, any order for the second; the rest is exhaustive."""
    cases = (replace(ALIGNED, M=200), replace(RAGGED, R=100), replace(RAGGED, R=8))
    for i, case in enumerate(cases):
        for name, options in SCHEDULES.items():
            chosen = name == "reverse-resident1" or (i == 1 and name.startswith("random"))
            marks = () if chosen else pytest.mark.exhaustive
            yield pytest.param(options, case, id=f"{name}-{case}", marks=marks)


@pytest.mark.parametrize(("options", "case"), list(_schedules()))
def test_every_schedule_gives_the_same_bits(ptx_executor, options, case):
    operands = make(case, ptx_executor.device)
    expected = fused(operands)
    with ptx_executor.with_options(**options):
        results = fused(operands)
    for name, value in expected.items():
        assert_same_bits(results[name], value, name=name)


RELEASE = re.compile(r"(?:atom|red)\.global\.gpu\.(release)\.add\.u32 \t?(%r\d+)?")


def release_of_flag(ptx: str) -> re.Match[str] | None:
    """The release whose result nobody reads, from Triton 3.9 on a red; None: another kernel's.

    The others count thread blocks that read no more words.
    """
    for found in RELEASE.finditer(ptx):
        # A register that is read appears more often than where it is initialised and written.
        if found[2] is None or len(re.findall(rf"{found[2]}\b", ptx)) <= 2:
            return found
    return None


def without_release(ptx: str) -> str:
    flag = release_of_flag(ptx)
    return ptx if flag is None else relaxed(ptx, flag)


def relaxed(ptx: str, release: re.Match[str]) -> str:
    return ptx[: release.start(1)] + "relaxed" + ptx[release.end(1) :]


def without_acquire(ptx: str) -> str:
    return ptx.replace("ld.global.gpu.acquire", "ld.global.gpu.relaxed")


def without_barrier(ptx: str) -> str:
    release = release_of_flag(ptx)
    if release is None:
        return ptx
    stored = ptx.rindex("st.global", 0, release.start())
    between = ptx[stored : release.start()].replace("bar.sync \t0;", "")
    return ptx[:stored] + between + ptx[release.start() :]


def without_order_of_leaving(ptx: str) -> str:
    """What the last thread block zeroes others may still be about to read."""
    flag = release_of_flag(ptx)
    if flag is None:
        return ptx
    for release in reversed([*RELEASE.finditer(ptx)]):
        if release.start() != flag.start():
            ptx = relaxed(ptx, release)
    return ptx


@pytest.mark.parametrize(
    "mutate", [without_release, without_acquire, without_barrier, without_order_of_leaving]
)
def test_the_race_check_notices_a_missing_link(ptx_executor, mutate):
    """A test of the tests: data store → barrier → release → acquire → load, without any one; and
    the last read of a word → its reset."""
    operands = make(ALIGNED, ptx_executor.device)
    with (
        ptx_executor.with_options(transform=mutate),
        pytest.raises(GlobalRace, match="ticketed_gemm"),
    ):
        fused(operands)


@pytest.fixture
def interpreted() -> Iterator[None]:
    """For what the compiler has no part in."""
    with lora_fast.set_backend("triton"):
        yield


LAYOUTS = ["contiguous", "transposed", "sliced"]


@pytest.mark.interpreter
# No shrinking, which takes minutes here.
@settings(max_examples=10, phases=[Phase.generate])
@given(
    M=st.integers(0, 40), K=st.integers(8, 70), N=st.integers(8, 70),
    R=st.sampled_from([3, 8, 16, 21, 40]), dtype=st.sampled_from([FP32, BF16, FP16]),
    nf4=st.booleans(), p=st.sampled_from([0.0, 0.25]), x_layout=st.sampled_from(LAYOUTS),
    dY_layout=st.sampled_from(LAYOUTS), gains=st.sets(st.sampled_from(["b", "d", "g", "bias"])),
)  # fmt: skip
def test_any_shape(interpreted, M, K, N, R, dtype, nf4, p, x_layout, dY_layout, gains):
    # At rank 1 the gradient of d is one sum, whose terms may cancel; MORE_CASES have that rank.
    factors = tuple(name for name in GAINS if name in {"x", "A", "B", *gains})
    check(
        Case(
            M, K, N, R, dtype, nf4=nf4, factors=factors, p=p,
            x_layout=x_layout, dY_layout=dY_layout,
        )
    )  # fmt: skip


@pytest.mark.interpreter
def test_no_dimension_is_a_multiple_of_a_block(interpreted):
    factors = tuple(name for name in GAINS if name != "d")
    check(replace(RAGGED, M=252, K=507, N=123, R=3, factors=factors))


@pytest.mark.interpreter
def test_subsets_of_gradients(interpreted):
    """Those that leave few out or few in; the torch backend has all."""
    case = replace(RAGGED, M=20, K=24, N=28, factors=GAINS)
    operands = make(case)
    yardsticks = exact(operands), eager(operands)
    for count in (0, 1, 2, 6, 7):
        for trains in itertools.combinations(GAINS, count):
            results = fused(make(replace(case, trains=trains)))
            found = {name for name in GAINS if results["d" + name] is not None}
            assert found == set(trains)
            names = ["y", *("d" + name for name in trains)]
            compared = ({name: values[name] for name in names} for values in (results, *yardsticks))
            assert_all_accurate(*compared, compute_dtype=BF16, name=str(trains))


@pytest.mark.interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_stays_in_its_row(interpreted, value):
    check_rows_keep_apart(replace(RAGGED, M=70, factors=GAINS, p=0.3, nf4=True), value)


@pytest.mark.interpreter
def test_all_dropped_leaves_the_base_and_no_adapter_gradient(interpreted):
    results = check(replace(RAGGED, M=40, p=1.0))
    assert not results["dA"].any() and not results["dB"].any()


@pytest.mark.interpreter
def test_inputs_stay_and_a_second_backward_gives_the_same_bits(interpreted):
    operands = make(replace(RAGGED, M=40, factors=GAINS, p=0.3, nf4=True))
    t, packed = operands.tensors, operands.weight.packed
    inputs = {**t, "dY": operands.dY, "packed": packed}
    before = {name: value.detach().clone() for name, value in inputs.items()}
    y = functional.adapted_linear(
        t["x"], operands.weight, t["bias"], **{name: t[name] for name in ("A", "B", "b", "d", "g")},
        dropout_p=0.3,
    )  # fmt: skip
    first, second = (
        torch.autograd.grad(y, list(t.values()), operands.dY, retain_graph=True) for _ in range(2)
    )
    for name, a, b in zip(t, first, second, strict=True):
        assert_same_bits(a, b, name=name)
    for name, value in inputs.items():
        assert_same_bits(value, before[name], name=name)


def test_launches_change_the_device_only_when_they_have_to(monkeypatch):
    """Triton launches on the current device, which may be another."""
    from lora_fast.backends import triton_ops

    made = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: made.append(index) or "guard")
    for index, is_cuda, guard in ((-1, False, None), (0, True, None), (1, True, "guard")):
        x = SimpleNamespace(get_device=lambda index=index: index, is_cuda=is_cuda)
        assert triton_ops.Launching(x)._device == guard
    assert made == [1]


@pytest.mark.interpreter
def test_every_launch_is_on_the_device_of_its_tensors(interpreted, monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    from lora_fast.backends import triton_ops

    inside, launched = [], []

    class Launching(triton_ops.Launching):
        def __enter__(self):
            inside.append(self)

        def __exit__(self, *exc):
            inside.pop()

    def recording(run: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(self, *args, **kwargs):
            launched.append((self.fn.__name__, bool(inside)))
            return run(self, *args, **kwargs)

        return recorded

    operands = make(replace(RAGGED, M=400, nf4=True))
    monkeypatch.setattr(triton_ops, "Launching", Launching)
    monkeypatch.setattr(GridExecutor, "__call__", recording(GridExecutor.__call__))
    fused(operands)
    check_group(BF16, FP32, True)
    W, A, B = torch.randn(20, 24), torch.randn(3, 24), torch.randn(20, 3)
    backend_for(W.device).row_norms(W, A, B, 0.5)
    backend_for(W.device).update_weight(W, W, A=A, B=B)
    kernels = {"nf4_decode", "ticketed_gemm", "strips", "row_norms"}
    assert {name for name, _ in launched} == kernels | {"weight_update"}
    assert [name for name, guarded in launched if not guarded] == []
