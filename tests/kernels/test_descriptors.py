"""Operands that TMA reads: which they are, and that only instructions change, not bits."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from machines import MACHINES, Executor, started

from bench.instruments.accuracy import assert_same_bits

pytest.importorskip("triton")
from lora_fast.kernels import descriptors, launch_policy, ticketed_gemm
from lora_fast.kernels.descriptors import (
    DESCRIBES,
    EXECUTED,
    MOST_LAYERS,
    can_describe,
    descriptors_of,
    wanted,
)
from lora_fast.kernels.launch_policy import GemmConfig
from lora_fast.kernels.ticketed_gemm import Layer
from lora_fast.kernels.tiles import Gains

from bench.instruments import stub_driver

BF16 = torch.bfloat16
TMA = launch_policy.pick_gemm(8192, BF16, 90)
BY_POINTERS = replace(TMA, descriptors=False)
# Two blocks of 64 of each; all of them end within the second.
RAGGED = 69, 72, 72
with_this_triton = pytest.mark.skipif(not DESCRIBES, reason="this Triton gets no descriptors")


def _matrix(rows: int, columns: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64).to(dtype)


def test_a_config_for_hopper_and_blackwell_alone_wants_descriptors():
    for arch in (None, 80, 86, 89, 90, 100, 103, 120):
        for has_gain in (False, True):
            found = launch_policy.pick_gemm(8192, BF16, arch, has_gain=has_gain).descriptors
            assert found == (arch in (90, 100, 103))
        assert not launch_policy.pick_gemm(8192, torch.float32, arch).descriptors


WIDE = torch.zeros(16, 80, dtype=BF16)


DESCRIBED = {
    "whole": WIDE,
    "float16": WIDE.half(),
    "from 16 bytes on": WIDE[:, 8:72],
    "odd width in wide rows": WIDE[:, :71],
    "every other row": WIDE[::2],
}
NOT_DESCRIBED = {
    "float32": WIDE.float(),
    "from 8 bytes on": WIDE[:, 4:],
    "rows of 156 bytes": WIDE[:, :78].contiguous(),
    "transposed": WIDE.T,
    "every other column": WIDE[:, ::2],
    "one row repeated": WIDE[:1].expand(16, 80),
    "no rows": WIDE[:0],
    "no columns": WIDE[:, :0],
    "rows 2 TB apart": torch.empty_strided((2, 8), (2**40, 1), dtype=BF16, device="meta"),
    "size beyond int32": torch.empty(1, 2**31, dtype=BF16, device="meta"),
}


@pytest.mark.parametrize("name", [*DESCRIBED, *NOT_DESCRIBED])
def test_rows_that_start_at_16_bytes_can_be_described(name):
    assert can_describe({**DESCRIBED, **NOT_DESCRIBED}[name]) is (name in DESCRIBED)


@with_this_triton
def test_all_operands_are_described_or_none():
    x, W, off = _matrix(130, 64), _matrix(96, 64), _matrix(96, 67)[:, :64]
    blocks = [d.block_shape for d in descriptors_of([(x, W)], TMA, 90, False) if d is not None]
    assert blocks == [[TMA.BLOCK_M, TMA.BLOCK_K], [TMA.BLOCK_N, TMA.BLOCK_K]]
    blocks = [d.block_shape for d in descriptors_of([(x, W)], TMA, 90, True) if d is not None]
    assert blocks == [[TMA.BLOCK_M, TMA.BLOCK_K], [TMA.BLOCK_K, TMA.BLOCK_N]]
    packed = object()
    for operands, config, arch in (
        ([(x, off)], TMA, 90),
        ([(x, W), (off, W)], TMA, 90),
        ([(x, packed)], TMA, 90),
        ([(x, W)] * (MOST_LAYERS + 1), TMA, 90),
        ([(x, W)], BY_POINTERS, 90),
        ([(x, W)], TMA, 89),
    ):
        assert set(descriptors_of(operands, config, arch, False)) == {None}
    assert None not in descriptors_of([(x, W)] * MOST_LAYERS, TMA, 90, True)


def test_a_triton_whose_launches_nothing_executes_gets_none(monkeypatch):
    monkeypatch.setattr(descriptors, "DESCRIBES", False)
    x, W = _matrix(130, 64), _matrix(96, 64)
    assert set(descriptors_of([(x, W)], TMA, 90, False)) == {None}


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("0", False), (None, EXECUTED), ("", EXECUTED)]
)
def test_a_variable_decides_otherwise(value, expected):
    assert wanted(value) is expected


@pytest.mark.parametrize("value", ["2", "yes", "True"])
def test_the_variable_is_0_or_1(value):
    with pytest.raises(ValueError, match="LORA_FAST_DESCRIPTORS must be 0 or 1, got"):
        wanted(value)


BOTH_DIRECTIONS = """
    import torch
    from bench.instruments import stub_driver
    from lora_fast.kernels import launch_policy, ticketed_gemm

    def meta(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    x, W, dY, A, B = (meta(*s) for s in ((256, 512), (384, 512), (256, 384), (16, 512), (384, 16)))
    for arch in (90, 100):
        with stub_driver.recording(arch) as log:
            ticketed_gemm.forward(x, W, A, B, 2.0)
            ticketed_gemm.grad_input([ticketed_gemm.Layer(dY, W, A, B, 2.0)])
        print(*(k.text("ptx").count("cp.async.bulk.tensor.2d") > 0 for k in log.kernels))
"""


@pytest.mark.offline
@pytest.mark.parametrize("value", ["1", "0"])
def test_the_variable_decides_for_whatever_triton_this_is(value):
    """Set before Python starts, as a user does; with 1 every supported Triton compiles TMA."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BOTH_DIRECTIONS)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"LORA_FAST_DESCRIPTORS": value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(value == "1")] * 4


def _results(config, device, case) -> list[torch.Tensor]:
    """Forward, dX of one layer with a gain, of a group, and of more layers than are described."""
    torch.manual_seed(0)
    M, K, N = case
    x, W, dY = (_matrix(*shape).to(device) for shape in ((M, K), (N, K), (M, N)))
    A, B = (_matrix(*shape, torch.float32).to(device) for shape in ((16, K), (N, 16)))
    gains = Gains(g=_matrix(1, N)[0].to(device))
    y, S, _ = ticketed_gemm.forward(x, W, A, B, 2.0, config=config)
    layers = [Layer(dY, W, A, B, 2.0), Layer(dY[:, :64], W[:64], A, B[:64], 1.0)]
    gained = ticketed_gemm.grad_input(layers[:1], gains=gains, config=config)
    summed = [
        ticketed_gemm.grad_input(group, config=config)
        for group in (layers, layers[:1] * (MOST_LAYERS + 1))
    ]
    gradients = [t for dX, dS in (gained, *summed) for t in (dX, dS.values)]
    return [y, S, *gradients]


@pytest.fixture
def described(monkeypatch) -> list[int]:
    """How many operands each launch had descriptors of."""
    counts: list[int] = []

    def counting(*args):
        found = descriptors_of(*args)
        counts.append(sum(d is not None for d in found))
        return found

    monkeypatch.setattr(ticketed_gemm, "descriptors_of", counting)
    return counts


WITH_TMA = [
    pytest.param(
        make, id=name, marks=[*marks, pytest.mark.exhaustive] if name == "sm_100" else marks
    )
    for name, make, marks in MACHINES
    if name != "sm_80"
]
SMALL = GemmConfig(64, 64, 64, 64, 8, num_warps=4, num_stages=3, descriptors=True)


@with_this_triton
@pytest.mark.parametrize("make", WITH_TMA)
def test_no_bit_depends_on_them(make: Callable[[], Executor], described):
    with started(make()) as executor:
        found = _results(SMALL, executor.device, RAGGED)
        assert described == [2, 2, 4, 0]
        pointers = _results(replace(SMALL, descriptors=False), executor.device, RAGGED)
        assert described == [2, 2, 4, 0] + [0] * 4
    for i, (one, other) in enumerate(zip(found, pointers, strict=True)):
        assert_same_bits(one, other, name=f"result {i}")


@with_this_triton
@pytest.mark.offline
@pytest.mark.pinned
@pytest.mark.parametrize("arch", [90, 100])
def test_they_take_fewer_instructions_and_no_other_resources(arch):
    def meta(*shape, dtype=BF16):
        return torch.empty(shape, dtype=dtype, device="meta")

    M, N, K, R = 8192, 4096, 4096, 16
    A, B = meta(R, K, dtype=torch.float32), meta(N, R, dtype=torch.float32)
    x, dY, W = meta(M, K), meta(M, N), meta(N, K)
    layers = [Layer(dY, W, A, B, 2.0, meta(16, M, R, dtype=torch.float32))] * MOST_LAYERS
    picked = launch_policy.pick_gemm(M, BF16, arch)
    kernels = {}
    for config in (picked, replace(picked, descriptors=False)):
        with stub_driver.recording(arch) as log:
            ticketed_gemm.forward(x, W, A, B, 2.0, config=config)
            ticketed_gemm.grad_input(layers, config=config)
        kernels[config.descriptors] = log.kernels
    for count, found, pointers in zip((1, MOST_LAYERS), kernels[True], kernels[False], strict=True):
        loops = [loop for loop in found.resources.hot_loops if loop.by_opcode["UTMALDG"]]
        assert [loop.by_opcode["UTMALDG"] for loop in loops] == [2] * count
        assert not any(loop.by_opcode["LDGSTS"] for loop in loops)
        longest = max(len(loop.instructions) for loop in loops)
        most = max(len(loop.instructions) for loop in pointers.resources.hot_loops)
        assert longest < 0.8 * most
        assert found.resources.local_bytes == 0
        assert found.num_stages == picked.num_stages
        assert found.resources.ctas_per_sm == pointers.resources.ctas_per_sm == 2
