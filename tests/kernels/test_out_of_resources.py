"""Configurations that do not fit the device: compiled for one with little shared memory."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from lora_fast.kernels import launch_policy, strips, ticketed_gemm
from lora_fast.kernels.launch_policy import GemmConfig, StripConfig
from lora_fast.kernels.out_of_resources import descent, instead_of, recording_drops
from lora_fast.kernels.scaling import Shrunk
from triton.runtime.errors import OutOfResources

from bench.instruments import stub_driver

BF16 = torch.bfloat16
GEMM = launch_policy.pick_gemm(8192, BF16, 90)


def _descent(config: GemmConfig | StripConfig) -> list[GemmConfig | StripConfig]:
    return list(descent(config))[1:]


@pytest.mark.parametrize(
    "config",
    [
        launch_policy.pick_gemm(M, dtype, arch)
        for M in (1, 64, 8192)
        for dtype in (BF16, torch.float32)
        for arch in (80, 89, 90, 100)
    ]
    + [launch_policy.pick_strips(dtype, R, 90) for dtype in (BF16, torch.float32) for R in (16, 64)]
    + [
        config
        for dtype in (BF16, torch.float32)
        for config in (launch_policy.pick_expand(dtype), launch_policy.pick_shrink(8192, dtype))
    ],
    ids=str,
)
def test_each_step_down_is_smaller_and_the_last_one_is_small(config):
    steps = [config, *_descent(config)]
    assert 2 <= len(steps) <= 12
    for before, after in itertools.pairwise(steps):
        changed = {
            name: (getattr(before, name), getattr(after, name))
            for name in vars(before)
            if getattr(before, name) != getattr(after, name)
        }
        assert len(changed) == 1
        assert all(small < large for large, small in changed.values())
    last = steps[-1]
    assert last.num_stages <= 2
    assert (last.BLOCK_N if isinstance(last, GemmConfig) else last.BLOCK_L) == 16


def launch(config, room, tried):
    """As the launchers do."""
    tried.append(config)
    try:
        if config.num_stages > room:
            raise OutOfResources(200, 100, "shared memory")
    except OutOfResources:
        launch(instead_of(config), room, tried)


def test_the_error_is_raised_where_nothing_smaller_is_left():
    tried = []
    with pytest.raises(OutOfResources, match="shared memory"):
        launch(GEMM, 0, tried)
    assert tried == [GEMM, *_descent(GEMM)]


def test_who_records_hears_what_was_tried_instead():
    four, three, two = (replace(GEMM, num_stages=stages) for stages in (4, 3, 2))
    launch(three, 2, [])
    with recording_drops() as drops:
        launch(two, 2, [])
        launch(four, 2, [])
    launch(three, 2, [])
    assert drops == [(four, three), (three, two)]


@pytest.mark.offline
def test_a_gemm_drops_to_what_the_device_has():
    """Five stages of 32 KiB, on a GPU with 99 KiB."""
    config = replace(GEMM, num_stages=5)
    x, W = torch.zeros(256, 512, dtype=BF16), torch.zeros(512, 512, dtype=BF16)
    A, B = torch.zeros(16, 512), torch.zeros(512, 16)
    with stub_driver.recording(89) as log:
        ticketed_gemm.forward(x, W, A, B, 2.0, config=config)
    (launch,) = log.launches
    assert launch.kernel.shared_bytes <= 99 * 1024
    assert launch.kernel.num_stages < config.num_stages


@pytest.mark.offline
def test_strips_drop_to_what_the_device_has():
    """Four stages of 64 KiB, on a GPU with 227 KiB."""
    config = StripConfig(64, 512, num_warps=8, num_stages=4)
    x, dS = torch.zeros(256, 512, dtype=BF16), torch.zeros(256, 16, dtype=BF16)
    with stub_driver.recording(90) as log:
        strips.grad_shrink(x, Shrunk(dS), torch.float32, config=config)
    (launch,) = log.launches
    assert launch.kernel.shared_bytes <= 227 * 1024
    assert launch.kernel.num_stages < config.num_stages


@pytest.mark.offline
def test_a_configuration_that_fits_is_the_one_that_runs():
    given = replace(GEMM, BLOCK_N=64, num_stages=2)
    x, W = torch.zeros(256, 512, dtype=BF16), torch.zeros(512, 512, dtype=BF16)
    with stub_driver.recording(90) as log:
        ticketed_gemm.forward(x, W, config=given)
    (launch,) = log.launches
    assert launch.constexprs["BLOCK_N"] == 64
    assert launch.kernel.num_stages == 2
