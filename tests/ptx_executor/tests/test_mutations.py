"""Synchronisation removed from real compiled kernels, one statement at a time.

Every mutant must be reported, give a visibly wrong result, or be harmless because the statement was
redundant. How many are reported is limited from below, so that a check that stops working is seen.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from bench.instruments.accuracy import assert_accurate, assert_same_bits
from tests import ptx_executor

triton = pytest.importorskip("triton")
from ptx_kernels import (  # noqa: E402
    BF16,
    FP32,
    described_gemm,
    descriptors,
    gemm,
    lora,
    softmax,
    whole_numbers,
)
from ptx_mutants import mutants, ptx_of  # noqa: E402

# The numbers are those of one compiler.
pytestmark = [pytest.mark.compiled, pytest.mark.pinned]

STATEMENTS = (
    r"bar\.sync[ \t]+\d+;",
    r"cp\.async\.wait_group[ \t]+\d+;",
    r"wgmma\.wait_group\.sync\.aligned \d+;",
    r"tcgen05\.wait::(?:ld|st)\.sync\.aligned;",
    r"@%p\d+ tcgen05\.commit[^;]*;",
    r"@!complete bra\.uni waitLoop;",
    r"mbarrier\.try_wait[^;]*;",
)
SYNCHRONISATION = re.compile(rf"^[ \t]*({'|'.join(STATEMENTS)})", re.M)


def run_softmax() -> None:
    x, y = torch.randn(4, 1000), torch.zeros(4, 1000)
    softmax[(4,)](x, y, 1000, BLOCK=1024)
    assert_accurate(y, x.double().softmax(1), x.softmax(1), name="softmax")


def run_gemm() -> None:
    M, N, K = 128, 64, 160
    x, w, y = whole_numbers(M, K), whole_numbers(K, N), torch.zeros(M, N)
    blocks = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}
    gemm[(1, 1)](x, w, y, M, N, K, PRECISION="tf32", **blocks, num_warps=4, num_stages=3)
    assert_same_bits(y, x.float() @ w.float(), name="y")


def run_lora() -> None:
    M, N, K = 128, 128, 320
    x, w = whole_numbers(M, K), whole_numbers(N, K)
    a, b = whole_numbers(16, K, most=1), whole_numbers(N, 16, most=1)
    y = torch.zeros(M, N)
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
    lora[(1, 1)](x, w, a, b, y, M, N, K, 0.5, R=16, **blocks, num_warps=8, num_stages=3)
    low = (x.double() @ a.double().T).to(BF16).double()
    expected = x.double() @ w.double().T + 0.5 * low @ b.double().T
    assert_same_bits(y, expected.to(FP32), name="y")


def run_described_gemm() -> None:
    M, N, K = 128, 128, 320
    x, w, y = whole_numbers(M, K), whole_numbers(N, K), torch.zeros(M, N, dtype=BF16)
    described = descriptors((x, [128, 64]), (w, [128, 64]), (y, [128, 128]))
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "SPECIALIZE": False}
    described_gemm[(1, 1)](*described, M, N, K, **blocks, num_warps=8, num_stages=3)
    assert_same_bits(y, (x.double() @ w.double().T).to(BF16), name="y")


CASES = [
    (run_softmax, 80, 5),
    (run_lora, 80, 15),
    (run_lora, 90, 8),
    (run_described_gemm, 90, 6),
    (run_gemm, 100, 8),
    (run_described_gemm, 100, 6),
]


@pytest.mark.parametrize(
    ("run", "arch", "reported"),
    [
        pytest.param(
            *case,
            id=f"sm_{case[1]}-{case[0].__name__}",
            marks=[] if case[0] in (run_softmax, run_gemm) else [pytest.mark.exhaustive],
        )
        for case in CASES
    ],
)
def test_removed_synchronisation(run, arch, reported):
    outcomes = Counter()
    for statement, transform in mutants(ptx_of(run, arch), SYNCHRONISATION):
        with ptx_executor.installed(arch, transform=transform):
            try:
                run()
            except ptx_executor.PTXError as error:
                outcomes[type(error).__name__] += 1
            except AssertionError:
                outcomes["wrong"] += 1
            else:
                outcomes["harmless"] += 1
                assert "wait" not in statement, f"{statement} was not missed"
    assert outcomes["SharedRace"] >= reported, outcomes
