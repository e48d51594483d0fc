"""The PTX executor notices a missing fence between generic writes and asynchronous reads."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from equation import Case, check, fused, make
from machines import ptx, started

from bench.instruments.accuracy import assert_same_bits
from tests import ptx_executor
from tests.ptx_executor import MissingFence, Options
from tests.ptx_executor.memory.proxies import ProxyFences

triton = pytest.importorskip("triton")
from ptx_kernels import BF16, FP32, described_gemm, descriptors, gemm, whole_numbers  # noqa: E402
from ptx_mutants import mutants, ptx_of  # noqa: E402

pytestmark = pytest.mark.compiled

FENCE = re.compile(r"^[ \t]*(fence\.proxy\.async[^;]*;)", re.M)
has_fences = pytest.mark.skipif(
    Options().of_missing_fences() == "count", reason="compilers before Triton 3.7 leave fences out"
)
ARCHS = [pytest.param(90, id="sm_90"), pytest.param(100, id="sm_100")]


def run_gemm() -> None:
    """Operands by cp.async."""
    x, w, y = whole_numbers(128, 96), whole_numbers(96, 64), torch.zeros(128, 64)
    blocks = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}
    gemm[(1, 1)](x, w, y, 128, 64, 96, PRECISION="tf32", **blocks, num_warps=4, num_stages=3)
    assert_same_bits(y, x.float() @ w.float(), name="y")


def run_described_gemm() -> None:
    """Operands by TMA, the result by st.shared and a TMA store."""
    x, w, y = whole_numbers(128, 64), whole_numbers(128, 64), torch.zeros(128, 128, dtype=BF16)
    described = descriptors((x, [128, 64]), (w, [128, 64]), (y, [128, 128]))
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "SPECIALIZE": False}
    described_gemm[(1, 1)](*described, 128, 128, 64, **blocks, num_warps=4, num_stages=2)
    assert_same_bits(y, (x.double() @ w.double().T).to(BF16), name="y")


@has_fences
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("run", [run_gemm, run_described_gemm])
def test_every_fence_of_a_compiled_kernel_is_missed(arch, run):
    text = ptx_of(run, arch)
    without = list(mutants(text, FENCE))
    assert without
    with ptx_executor.installed(arch, check_fences="error"):
        run()
    for _, transform in without:
        with (
            ptx_executor.installed(arch, check_fences="error", transform=transform),
            pytest.raises(MissingFence, match=r"(wgmma|tcgen05|cp) reads .* fence.proxy.async"),
        ):
            run()


@has_fences
@pytest.mark.parametrize("arch", ARCHS)
def test_a_fence_before_the_wait_of_a_copy_covers_nothing(arch):
    """The order is wait, barrier, fence, product: with the fence in front the product is late."""
    text = ptx_of(run_gemm, arch)
    fence, wait = FENCE.search(text).group(1), re.compile(r"cp\.async\.wait_group")

    def first(_):
        return wait.sub(fence + " cp.async.wait_group", FENCE.sub(";", text))

    with (
        ptx_executor.installed(arch, check_fences="error", transform=first),
        pytest.raises(MissingFence),
    ):
        run_gemm()


@has_fences
@pytest.mark.parametrize("arch", ARCHS)
def test_a_fence_by_the_writers_before_their_barrier_is_enough(arch):
    text = ptx_of(run_gemm, arch)
    fence = FENCE.search(text).group(1)

    def by_writers(_):
        return re.sub(r"bar\.sync[ \t]+0;", fence + " bar.sync 0;", FENCE.sub(";", text))

    with ptx_executor.installed(arch, check_fences="error", transform=by_writers):
        run_gemm()


ALIGNED = Case(M=64, K=128, N=128, R=16, dtype=BF16, adapter_dtype=FP32, factors=("x", "A", "B"))
KERNELS = [ALIGNED, replace(ALIGNED, factors=("x", "bias", "A", "B"), adapter_dtype=None, nf4=True)]


def _without_fences(text):
    return FENCE.sub(";", text)


@has_fences
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_our_kernels_have_all_fences(arch, case):
    """With them nothing is counted; without, products of both kernels are."""
    with started(ptx(arch)) as machine:
        with machine.with_options(check_fences="count"):
            check(case, machine.device)
            assert ptx_executor.report()["missing_fences"] == {}
        with machine.with_options(check_fences="count", transform=_without_fences):
            fused(make(case, machine.device))
            missing = ptx_executor.report()["missing_fences"]
        for kernel in ("ticketed_gemm", "strips"):
            assert any(name.startswith(f"{kernel}_") for name in missing), missing
        with machine.with_options(check_fences="off", transform=_without_fences):
            fused(make(case, machine.device))
            assert ptx_executor.report()["missing_fences"] == {}


@pytest.mark.parametrize(
    ("version", "expected"),
    [("3.5.1", "count"), ("3.6.0", "count"), ("3.7.0", "error"), ("3.10.0", "error")],
)
def test_compilers_that_leave_fences_out_are_counted(version, expected, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert Options().of_missing_fences() == expected
    assert Options(check_fences="error").of_missing_fences() == "error"


class Warps:
    """Four warps of one CTA that write, meet and fence; what each has seen of the others."""

    def __init__(self) -> None:
        self.fences, self.now = ProxyFences(1, 4), 1
        self.seen = np.zeros((4, 4), np.int32)

    def fence(self, warp: int, *, whole: bool = True) -> None:
        self.fences.fence(self.seen[warp], self.now, 0, warp, whole=whole)
        self.now += 1

    def meet(self, *warps: int) -> None:
        self.fences.barrier([0], list(warps), self.now)
        self.seen[warps, :] = self.seen[list(warps)].max(axis=0)
        self.seen[np.ix_(warps, warps)] = self.now
        self.now += 1

    def is_missing(self, writer: int, at: int, reader: int) -> bool:
        row = self.fences.fenced[0, reader]
        found = self.fences.missing(np.array([at]), np.array([writer]), lambda by: row[by])
        return bool(found[0])


def test_the_fence_may_be_the_writers_the_readers_or_one_in_between():
    for who in (0, 1, 2):
        warps, at = Warps(), 1
        for step, pair in ((0, (0, 1)), (1, (1, 2)), (2, ())):
            if step == who:
                warps.fence(who)
            if pair:
                warps.meet(*pair)
        assert not warps.is_missing(0, at, 2), who
        assert warps.is_missing(0, at, 3), "nobody told warp 3"


def test_a_fence_off_the_path_covers_nothing():
    warps, at = Warps(), 1
    warps.fence(3)
    warps.meet(0, 1)
    assert warps.is_missing(0, at, 1)
    warps.meet(1, 3)
    assert warps.is_missing(0, at, 3), "fenced before it knew of the write"
    assert warps.is_missing(0, warps.now, 0), "a write after every fence"


def test_a_fence_by_some_threads_covers_what_came_before_the_last_barrier():
    warps, before = Warps(), 1
    warps.meet(0, 1, 2, 3)
    after = warps.now
    warps.fence(0, whole=False)
    assert not warps.is_missing(0, before, 0) and not warps.is_missing(1, before, 0)
    assert warps.is_missing(0, after, 0)
    warps.fence(0)
    assert not warps.is_missing(0, after, 0)


def test_asynchronous_writes_need_no_fence():
    warps = Warps()
    agents = np.array([4, 5])  # of a product, and of bulk copies
    assert not warps.fences.missing(np.array([9, 9]), agents, lambda by: np.zeros(2)).any()
