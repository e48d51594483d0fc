"""The kernels against the float64 reference: interpreted, compiled and executed, or on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy import assert_all_accurate, assert_same_bits
from equation import Case, check, eager, exact, fused, lay_out, make, variations

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GAINS = ("x", "bias", "A", "B", "b", "d", "g")

# Ragged in every dimension, more than one tile of rows and of columns, several row ranges.
RAGGED = Case(M=150, K=72, N=136, dtype=BF16, adapter_dtype=FP32)

# Multiples of 16 everywhere: wide loads, asynchronous copies and the software pipeline.
ALIGNED = replace(RAGGED, M=160, K=128, N=256, R=16, factors=("x", "A", "B"))

# What is executed for every architecture; MORE_CASES are for one of them.
CASES = [
    *variations(RAGGED, R=(8, 100)),
    replace(RAGGED, K=75, N=131, M=33, R=8, x_layout="transposed", dY_layout="sliced"),
    replace(RAGGED, dtype=FP16, adapter_dtype=None, nf4=True, nested=False),
    replace(RAGGED, dtype=FP32, adapter_dtype=None, M=35, R=100, dY_layout="transposed"),
    replace(RAGGED, M=70, dtype=FP32, adapter_dtype=None, p=0.3125, factors=GAINS, nf4=True),
    ALIGNED,
    replace(ALIGNED, factors=("x", "bias", "A", "B"), adapter_dtype=None, nf4=True),
    replace(ALIGNED, factors=GAINS, R=80),
    replace(ALIGNED, p=0.3, R=64),
    replace(ALIGNED, R=80, spans=((0, 16), (64, 80), (0, 0), (16, 64))),
]
MORE_CASES = [
    replace(RAGGED, R=1),
    replace(RAGGED, R=16),
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
def test_launches(executor, nf4):
    operands = make(replace(RAGGED, M=64, nf4=nf4), executor.device)
    with executor.counting_launches() as names:
        fused(operands)
    forward, backward = LAUNCHES
    assert names == [*forward, *backward]


def test_two_runs_give_the_same_bits(executor):
    operands = make(replace(ALIGNED, M=300, R=80, factors=GAINS), executor.device)
    first, second = fused(operands), fused(operands)
    for name in first:
        assert_same_bits(first[name], second[name], name=name)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "reverse", "resident": 1},
        {"schedule": "reverse"},
        {"schedule": "random:7", "resident": 3},
    ],
    ids=["reverse-resident1", "reverse", "random-resident3"],
)
@pytest.mark.parametrize("case", [replace(ALIGNED, M=200), replace(RAGGED, R=100)], ids=str)
def test_every_schedule_gives_the_same_bits(ptx_executor, options, case):
    operands = make(case, ptx_executor.device)
    expected = fused(operands)
    with ptx_executor.with_options(**options):
        results = fused(operands)
    for name, value in expected.items():
        assert_same_bits(results[name], value, name=name)


def without_release(ptx: str) -> str:
    return ptx.replace("atom.global.gpu.release", "atom.global.gpu.relaxed")


def without_acquire(ptx: str) -> str:
    return ptx.replace("ld.global.gpu.acquire", "ld.global.gpu.relaxed")


def without_barrier(ptx: str) -> str:
    before, release, after = ptx.partition("atom.global.gpu.release")
    head, _, tail = before.rpartition("bar.sync \t0;")
    return head + tail + release + after


@pytest.mark.parametrize("mutate", [without_release, without_acquire, without_barrier])
def test_the_race_check_notices_a_missing_link(ptx_executor, mutate):
    """A test of the tests: data store → barrier → release → acquire → load, without any one."""
    import ptxrun

    operands = make(ALIGNED, ptx_executor.device)
    with (
        ptx_executor.with_options(transform=mutate),
        pytest.raises(ptxrun.GlobalRace, match="ticketed_gemm"),
    ):
        fused(operands)
