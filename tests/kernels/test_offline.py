"""Every kernel × shipped configuration, compiled through its launcher for absent GPUs.

Asserted of each launch: no local memory (spilled registers) beyond what ``assert_fits`` in
tests/support/offline_launches.py names, shared memory within the device's limit, and matrix
products on the tensor cores of its generation, for float32 (IEEE) on none; that asynchronous
products are fenced from generic writes and are not serialised.

N and K are multiples of 16 here, as in every transformer. Rows that start off 16 bytes load element
by element; other tests prove such kernels right, not fast.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from lora_fast.kernels import (
    dropout,
    expand,
    launch_policy,
    row_norms,
    scaling,
    shrink,
    strips,
    ticketed_gemm,
    weight_update,
)
from lora_fast.kernels.tiles import NO_GAINS, Gains
from offline_launches import assert_fits, assert_products_run_on, expected_mma, meta
from triton.runtime.jit import JITFunction

import lora_fast
from bench.instruments import resources, stub_driver
from lora_fast.functional import Member, adapted_linear, adapted_linears

pytestmark = pytest.mark.offline

ARCHS = [80, 89, 90, 100, 120]


@dataclass(frozen=True)
class Case:
    """One layer in training. More rows make no other kernel: nothing is specialised on M."""

    name: str
    M: int = 256
    N: int = 4096
    K: int = 4096
    R: int = 16
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.bfloat16
    gains: str = ""
    dropout_p: float = 0.0


# PEFT keeps the adapters of a 16-bit model in float32.
PLAIN = Case("bf16", adapter_dtype=torch.float32)
FEW_ROWS = replace(PLAIN, name="bf16-few-rows", M=48)
# The shrink's float32 A of 64 columns is what its shared memory must hold.
ONE_ROW_BLOCK = replace(PLAIN, name="bf16-16-rows-r64", M=16, R=64)
FP32 = Case("fp32", dtype=torch.float32, adapter_dtype=torch.float32)
R64 = Case("bf16-r64", R=64)
R100 = Case("bf16-r100", R=100)  # rows off 16 bytes, and a last chunk of 36
DROPOUT = replace(PLAIN, name="bf16-dropout", dropout_p=0.1)
# A in bfloat16, and as many ranks as leave a product running into the next iteration.
DROPOUT_R32 = Case("bf16-dropout-r32", R=32, dropout_p=0.1)
DORA = replace(PLAIN, name="bf16-dora", gains="g")
FP16 = replace(PLAIN, name="fp16", dtype=torch.float16)
FP16_R64 = replace(FP16, name="fp16-r64", R=64)
FP16_DROPOUT = replace(FP16, name="fp16-dropout", dropout_p=0.1)
ALL_FACTORS = replace(DROPOUT, name="bf16-gains-dropout", gains="bdg")
ROUTES = [PLAIN, R64, R100, FP32, FP16_DROPOUT, ALL_FACTORS]
CASES: dict[int, list[Case]] = {
    80: [FP16, FP16_R64, FP16_DROPOUT, R64, R100, replace(FP32, name="fp32-r64", R=64), DORA],
    89: [R100, FP32, DROPOUT],
    90: [
        FP16,
        FP16_R64,
        FP16_DROPOUT,
        R100,
        replace(FP32, name="fp32-r100", R=100),
        ALL_FACTORS,
        DORA,
        DROPOUT_R32,
    ],
    100: [FP16, FP16_R64, FP16_DROPOUT, R64, FP32, DROPOUT, DORA],
    120: [FP16, R100, replace(FP32, name="fp32-r64", R=64)],
}


# What the suite leaves out, since another case of the same dtype, rank and arch has its kernels.
EXHAUSTIVE = {80: (FP16, R64), 89: (FEW_ROWS, ONE_ROW_BLOCK), 90: (FP16, DROPOUT_R32)}
EXHAUSTIVE |= {100: (FP16, R64), 120: (ONE_ROW_BLOCK,)}


def _matrix() -> Iterator[Any]:
    for arch in ARCHS:
        for case in (PLAIN, FEW_ROWS, ONE_ROW_BLOCK, *CASES[arch]):
            marks = pytest.mark.exhaustive if case in EXHAUSTIVE[arch] else ()
            yield pytest.param(arch, case, id=f"sm_{arch}-{case.name}", marks=marks)


def _training_step(arch: int, case: Case) -> stub_driver.Log:
    def zeros(*shape: int, dtype: torch.dtype = case.dtype, grad: bool = True) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=grad)

    adapter = case.adapter_dtype
    gains = {name: zeros(case.R if name == "d" else case.N) for name in case.gains}
    with stub_driver.recording(arch) as log, lora_fast.set_backend("triton"):
        y = adapted_linear(
            zeros(case.M, case.K),
            zeros(case.N, case.K, grad=False),
            zeros(case.N, grad=False),
            A=zeros(case.R, case.K, dtype=adapter),
            B=zeros(case.N, case.R, dtype=adapter),
            scaling=2.0,
            dropout_p=case.dropout_p,
            **gains,
        )
        y.backward(zeros(case.M, case.N, grad=False))
    return log


def _group_step(arch: int, dropout_p: float, R: int = 16, nf4: bool = False) -> stub_driver.Log:
    """q, k and v of a layer with grouped queries: one x, three widths, float32 adapters."""
    x = torch.zeros(256, 4096, dtype=torch.bfloat16, requires_grad=True)
    weights = [torch.zeros(N, 4096, dtype=torch.bfloat16) for N in (4096, 1024, 1024)]
    members = [
        Member(
            lora_fast.NF4Weight.from_dense(weight) if nf4 else weight,
            None,
            torch.zeros(R, 4096, requires_grad=True),
            torch.zeros(weight.shape[0], R, requires_grad=True),
        )
        for weight in weights
    ]
    with stub_driver.recording(arch) as log, lora_fast.set_backend("triton"):
        ys = adapted_linears(x, members, dropout_p=dropout_p)
        torch.autograd.backward(ys, [torch.zeros_like(y) for y in ys])
    return log


def _routes_step(arch: int, case: Case) -> stub_driver.Log:
    """A layer and three that share x, on the routes that leave the product with W to cuBLAS."""
    x, S = meta(8192, case.K, dtype=case.dtype), meta(8192, 3 * case.R, dtype=case.dtype)
    A, B = (meta(*s, dtype=case.adapter_dtype) for s in ((case.R, case.K), (case.N, case.R)))
    drops, layer = dropout.Dropout(case.dropout_p, 3), expand.Layer(B, 2.0, meta(case.N))
    gains = Gains(meta(case.N), meta(case.R)) if case.gains else NO_GAINS
    with stub_driver.recording(arch) as log:
        for rows in (x[:2048], x):
            shrink.beside_rows(rows, [A], drops, saves_S=True)
        shrink.of_rows(x, [A] * 3, drops)
        for count in (1, 3):
            expand.outputs(S, case.dtype, [layer] * count, gains)
            dS = scaling.new_gradient(x, count * case.R, 64)
            expand.input_gradient(dS, case.dtype, [A] * count, drops)
    return log


@pytest.mark.parametrize(("arch", "case"), _matrix())
def test_a_training_step_fits_the_device(arch: int, case: Case) -> None:
    log = _training_step(arch, case)
    assert log.names == ["ticketed_gemm", "strips", "ticketed_gemm", "strips"]
    for launch in log.launches:
        assert_fits(launch, arch)
        assert_products_run_on(launch, arch)
        found = launch.kernel.resources
        expected = expected_mma(launch, arch)
        assert set(found.mma) == expected, f"{launch.name}: {found.mma}"
        assert bool(found.hot_loops) == bool(expected)
        assert all(loop.by_class["local"] == 0 for loop in found.hot_loops)


@pytest.mark.parametrize(
    ("arch", "dropout_p"), [(arch, 0.1) for arch in ARCHS] + [(90, 0.0), (100, 0.0)]
)
def test_a_group_of_layers_fits_the_device(arch: int, dropout_p: float) -> None:
    log = _group_step(arch, dropout_p)
    assert log.names == ["ticketed_gemm"] * 3 + ["strips", "ticketed_gemm", "strips"]
    for launch in log.launches:
        assert_fits(launch, arch)
        assert_products_run_on(launch, arch)
        assert set(launch.kernel.resources.mma) == {resources.limits_of(arch).mma}


def _routes_matrix() -> Iterator[Any]:
    """Every case on sm_90, and one elsewhere; the rest is exhaustive."""
    for arch in ARCHS:
        for case in ROUTES:
            chosen = arch == 90 or case == (R64 if arch == 100 else FP16_DROPOUT)
            marks = () if chosen else pytest.mark.exhaustive
            yield pytest.param(arch, case, id=f"sm_{arch}-{case.name}", marks=marks)


@pytest.mark.parametrize(("arch", "case"), list(_routes_matrix()))
def test_the_kernels_beside_cublas_fit_the_device(arch: int, case: Case) -> None:
    for launch in _routes_step(arch, case).launches:
        assert_fits(launch, arch)
        assert_products_run_on(launch, arch)
        assert set(launch.kernel.resources.mma) == expected_mma(launch, arch), launch.name


@pytest.mark.exhaustive
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_wide_rank_fits_beside_a_second_accumulator(arch: int, nf4: bool) -> None:
    for launch in _group_step(arch, 0.1, R=64, nf4=nf4).launches:
        assert_fits(launch, arch)
        assert_products_run_on(launch, arch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_row_norms_fit_the_device(arch: int, dtype: torch.dtype) -> None:
    W = torch.empty(4096, 4096, dtype=dtype, device="meta")
    A, B = torch.empty(64, 4096, device="meta"), torch.empty(4096, 64, device="meta")
    with stub_driver.recording(arch) as log:
        row_norms.norms_of(W, A, B, 0.5)
    assert log.names == ["row_norms"]
    assert_fits(log.launches[0], arch)
    # 32 rows: the products of 16-bit factors go to the tensor cores as HMMA on every generation.
    expected = set() if dtype == torch.float32 else {"HMMA"}
    assert set(log.launches[0].kernel.resources.mma) == expected


# Instructions of the K-loops of the forward pass, GEMM and shrink: measured, plus a tenth. What the
# compiler fails to hoist, a conversion or an address, shows here without a device.
K_LOOP_BUDGET = {80: 174, 89: 108, 90: 107, 100: 148, 120: 99}


@pytest.mark.pinned
@pytest.mark.parametrize("arch", ARCHS)
def test_the_k_loops_stay_within_their_budget(arch: int) -> None:
    launch = _training_step(arch, PLAIN).launches[0]
    loops = launch.kernel.resources.hot_loops
    k_loops = [loop for loop in loops if loop.mma == loops[0].mma]
    assert max(len(loop.instructions) for loop in k_loops) <= K_LOOP_BUDGET[arch]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_weight_update_fits_the_device(arch: int, dtype: torch.dtype) -> None:
    N, K, R = 4096, 4096, 32

    for gains in (NO_GAINS, Gains(meta(N), meta(R), meta(N))):
        W = meta(N, K, dtype=dtype)
        with stub_driver.recording(arch) as log:
            weight_update.update(W, W, meta(R, K), meta(N, R), gains, 0.5)
        (launch,) = log.launches
        assert_fits(launch, arch)
        # float32 products stay float32: no tensor core takes them.
        assert not launch.kernel.resources.mma


def test_the_cases_use_every_shipped_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    picked = set()

    def recording_picks(pick: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            config = pick(*args, **kwargs)
            picked.add(config)
            return config

        return recorded

    pickers = {"gemm": ticketed_gemm, "strips": strips, "expand": expand, "shrink": shrink}
    for name, module in pickers.items():
        picks = recording_picks(getattr(module, f"pick_{name}"))
        monkeypatch.setattr(module, f"pick_{name}", picks)
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: None)
    for arch in ARCHS:
        for case in (PLAIN, FEW_ROWS, ONE_ROW_BLOCK, *CASES[arch]):
            _training_step(arch, case)
        for case in ROUTES:
            _routes_step(arch, case)
    rows = [row.picked for row in launch_policy.TABLE.values()]
    assert {
        *itertools.chain(*rows),
        *launch_policy.OF_ALL,
        *launch_policy.OF_ROUTES,
    } - picked == set()
