"""Kernels that decode NF4, compiled for absent GPUs: as test_offline.py, and instructions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from lora_fast.kernels import nf4_decode, nf4_tile, ticketed_gemm
from offline_launches import assert_fits, assert_products_run_on, expected_mma, meta

from bench.instruments import sass, stub_driver

pytestmark = pytest.mark.offline

ARCHS = [80, 89, 90, 100, 120]
# Machine instructions for one weight. A GPU of 2.8 TB/s and 28 T thread instructions a second moves
# the 2.5 bytes of a weight in the time of 25; decoding should leave most of them to others.
NF4_BUDGET = 7.5
AUGMENTED_BUDGET = 15.5  # half as many weights in a program, and the columns behind them


def _nf4(N: int, K: int, *, nested: bool, blocksize: int = 64) -> nf4_tile.Nf4Operand:
    blocks = N * K // blocksize
    inner = SimpleNamespace(absmax=meta(blocks // 256), code=meta(256), blocksize=256)
    state = SimpleNamespace(
        shape=(N, K),
        nested=nested,
        absmax=meta(blocks, dtype=torch.uint8 if nested else torch.float32),
        state2=inner if nested else None,
        offset=meta(1).squeeze(0) if nested else None,
        code=meta(16),
        blocksize=blocksize,
    )
    return nf4_tile.Nf4Operand(meta(N * K // 2, dtype=torch.uint8), state)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("arch", ARCHS)
def test_nf4_decode_fits_the_device(arch: int, nested: bool) -> None:
    N, K = 4096, 4096
    weight = _nf4(N, K, nested=nested)
    with stub_driver.recording(arch) as log:
        nf4_decode.decode(weight.packed, weight.quant_state, torch.bfloat16)
        nf4_decode.augmented(
            weight.packed, weight.quant_state, torch.bfloat16, meta(N, 16), 2.0, columns=16
        )
    for launch, budget in zip(log.launches, (NF4_BUDGET, AUGMENTED_BUDGET), strict=True):
        assert_fits(launch, arch)
        executed = launch.kernel.resources.instructions.total() * launch.kernel.num_warps * 32
        assert executed * launch.num_programs / (N * K) <= budget


def _in_gemm(arch: int, M: int, R: int, dtype: torch.dtype) -> stub_driver.Log:
    """Forward and input gradient of a layer whose doubly quantised weight the GEMM decodes."""
    N, K = 4096, 4096
    weight, A, B = _nf4(N, K, nested=True), meta(R, K), meta(N, R)
    x, dY = meta(M, K, dtype=dtype), meta(M, N, dtype=dtype)
    with stub_driver.recording(arch) as log:
        ticketed_gemm.forward(x, weight, A, B, 2.0)
        ticketed_gemm.grad_input([ticketed_gemm.Layer(dY, weight, A, B, 2.0, meta(4, M, R))])
    return log


# Instructions of the K-loops that decode, forward and input gradient: measured, plus a twentieth.
# sm_90 and sm_100 take 64 columns of K, the others 32; sm_80 has half as many warps.
NF4_K_LOOP_BUDGET = {80: 343, 89: 205, 90: 250, 100: 426, 120: 202}


@pytest.mark.parametrize("arch", ARCHS)
def test_nf4_in_the_gemm_fits_the_device(arch: int) -> None:
    for M, R in ((16, 64), (384, 16)):
        for launch in _in_gemm(arch, M, R, torch.bfloat16).launches:
            assert_fits(launch, arch)
            assert_products_run_on(launch, arch)
            found = launch.kernel.resources
            assert set(found.mma) == expected_mma(launch, arch)
            assert _decoding(launch).by_class["local"] == 0


@pytest.mark.pinned
@pytest.mark.parametrize("arch", ARCHS)
def test_the_k_loops_that_decode_stay_within_their_budget(arch: int) -> None:
    for launch in _in_gemm(arch, 384, 16, torch.bfloat16).launches:
        assert len(_decoding(launch).instructions) <= NF4_K_LOOP_BUDGET[arch]
        assert launch.kernel.resources.ctas_per_sm >= (2 if arch in (80, 90, 100) else 1)


def _decoding(launch: stub_driver.Launch) -> sass.Loop:
    (loop,) = (loop for loop in launch.kernel.resources.hot_loops if loop.by_class["shuffle"])
    return loop


def test_nf4_in_a_float32_gemm_fits_the_device() -> None:
    for launch in _in_gemm(90, 40, 16, torch.float32).launches:
        assert_fits(launch, 90)
        assert not launch.kernel.resources.mma
