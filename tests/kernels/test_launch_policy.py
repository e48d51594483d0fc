"""Every shipped configuration alone gives the right answer, and each is picked where it should
be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from equation import Case, check
from machines import MACHINES, Executor, started

pytest.importorskip("triton")
from lora_fast.kernels import launch_policy, strips, ticketed_gemm
from lora_fast.kernels.dropout import Dropout
from lora_fast.kernels.launch_policy import GemmConfig, StripConfig
from lora_fast.kernels.ticketed_gemm import Layer
from lora_fast.kernels.tiles import NO_GAINS, Gains

from bench.instruments import resources, stub_driver

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHS = [None, 80, 86, 87, 89, 90, 100, 103, 120]
# Columns that make two waves of wide tiles.
N = 4096
LAUNCHES: list[dict[str, Any]] = [{}, {"R": 21}, {"has_gain": True}, {"masks_dX": True}]


def _ragged(config: GemmConfig | StripConfig, dtype: torch.dtype) -> Case:
    """One block and a little more of everything that the configuration cuts into blocks."""
    p = 0.0
    if isinstance(config, GemmConfig):
        # Only rows that start at multiples of 16 bytes have descriptors.
        more = 8 if config.descriptors else 6
        M, L = config.BLOCK_M + 5, max(config.BLOCK_N, config.BLOCK_K) + more
        p = 0.3 * (config.MASK_PARTS > 1)
    else:
        M, L = config.BLOCK_M + 5, config.BLOCK_L + 6
    adapter = FP32 if dtype == BF16 else None
    return Case(M=M, K=L, N=L + 8, R=21, p=p, dtype=dtype, adapter_dtype=adapter)


def _picked() -> Iterator[tuple[GemmConfig | StripConfig, torch.dtype]]:
    """Everything that a launch may be given by the policy or the tuner, with a dtype it is for."""
    for dtype in (BF16, FP32):
        for arch in ARCHS:
            for M in (16, 64, 8192):
                for launch in LAUNCHES:
                    yield launch_policy.pick_gemm(M, dtype, arch, **launch), dtype
                for launch in ({}, {"masks_dX": True}):
                    for other in launch_policy.other_gemms(M, N, dtype, arch, **launch):
                        yield other, dtype
            for R in (16, 64):
                yield launch_policy.pick_strips(dtype, R, arch), dtype


SHIPPED = dict(_picked())


def _forcing(config: GemmConfig | StripConfig) -> pytest.MonkeyPatch:
    patch = pytest.MonkeyPatch()
    is_gemm = isinstance(config, GemmConfig)
    module, name = (ticketed_gemm, "pick_gemm") if is_gemm else (strips, "pick_strips")
    patch.setattr(module, name, lambda *args, **kwargs: config)
    return patch


def _check_alone(config: GemmConfig | StripConfig, executor: Executor, **changes: Any) -> None:
    patch = _forcing(config)
    try:
        check(replace(_ragged(config, SHIPPED[config]), **changes), executor.device)
    finally:
        patch.undo()


def test_all_are_known_to_this_file():
    rows = launch_policy.TABLE.values()
    listed = {
        config
        for row in rows
        for config in (*row.picked, *row.others, *row.wide, *row.wide_masks_dX)
    }
    assert set(SHIPPED) == {*listed, *launch_policy.OF_ALL}


@pytest.mark.parametrize("archs", launch_policy.TABLE, ids=str)
def test_a_launch_takes_what_its_row_of_the_table_says(archs):
    row = launch_policy.TABLE[archs]
    for arch in archs:
        pick = functools.partial(launch_policy.pick_gemm, 8192, BF16, arch)
        assert pick() == pick(R=64) == row.plain
        assert pick(R=20) == (row.ragged_rank or row.plain)
        assert pick(has_gain=True, R=20) == (row.gain or row.plain)
        assert pick(masks_dX=True, has_gain=True) == (row.masks_dX or row.plain)
        assert launch_policy.pick_strips(BF16, 32, arch) == row.strips
        assert launch_policy.pick_strips(BF16, 33, arch) == row.strips_wide_rank
        others = functools.partial(launch_policy.other_gemms, 8192, N, BF16, arch)
        assert others() == (*row.wide, *row.others)
        assert others(has_gain=True) == row.wide_gain
        assert others(masks_dX=True) == row.wide_masks_dX
        assert launch_policy.strip_ctas(arch) == row.strip_ctas


def test_a_device_that_is_not_in_the_table_takes_pointers_and_tunes_nothing():
    assert not launch_policy.pick_gemm(8192, BF16, 75).descriptors
    assert launch_policy.other_gemms(8192, N, BF16, 75) == ()


@pytest.mark.parametrize(("arch", "least"), [(90, 17 * 16), (100, 19 * 16)])
def test_wide_tiles_come_in_two_waves(arch, least):
    """264 tiles of 128 × 256 on 132 multiprocessors, 296 on 148."""
    rows, columns = 128 * (least // 16), 256 * 16
    others = launch_policy.other_gemms(rows, columns, BF16, arch)
    assert [c.BLOCK_N for c in others[:3]] == [256] * 3
    assert [(c.num_stages, c.GROUP_M) for c in others[:3]] == [(4, 8), (3, 8), (4, 16)]
    fewer = launch_policy.other_gemms(rows - 128, columns, BF16, arch)
    assert fewer and all(c.BLOCK_N < 256 for c in fewer)
    assert launch_policy.other_gemms(rows - 128, columns, BF16, arch, has_gain=True) == ()


def _label(config: GemmConfig | StripConfig) -> str:
    return "-".join(str(value) for value in vars(config).values())


# The interpreter knows neither warps nor stages.
TILES = {_label(replace(config, num_warps=1, num_stages=1)): config for config in SHIPPED}


@pytest.mark.interpreter
@pytest.mark.parametrize("config", TILES.values(), ids=_label)
def test_a_configuration_alone_is_right(config):
    with started(MACHINES[0][1]()) as executor:
        _check_alone(config, executor)


def test_strips_keep_the_memory_busy():
    """Bytes of dY on their way: two stages of a tile in each CTA, for about a microsecond."""
    for arch, bandwidth in ((80, 2.0e12), (90, 3.35e12), (100, 8.0e12)):
        config = launch_policy.pick_strips(BF16, 16, arch)
        tile = 2 * config.BLOCK_M * config.BLOCK_L
        assert launch_policy.strip_ctas(arch) * tile >= 0.9e-6 * bandwidth, arch


def _short(config: GemmConfig) -> str:
    tile = f"{config.BLOCK_M}x{config.BLOCK_N}-{config.num_stages}-{config.GROUP_M}"
    return tile + "-tma" * config.descriptors + "-masks" * (config.MASK_PARTS > 1)


def _compiled() -> Iterator[object]:
    """Those of the tuner, on the architectures they are for; test_kernels.py runs what is picked.

    Multiples of 16 make the loads wide and asynchronous."""
    for name, make, marks in MACHINES[1:]:
        arch = int(name.removeprefix("sm_")) if name.startswith("sm_") else 90
        masked = launch_policy.other_gemms(8192, N, BF16, arch, masks_dX=True)
        for config in (*launch_policy.other_gemms(8192, N, BF16, arch), *masked):
            for even in (False, True):
                usual = (arch, config.BLOCK_M, even) == (90, 64, True)
                slow = [] if usual else [pytest.mark.exhaustive]
                label = f"{name}-{_short(config)}-{'even' if even else 'ragged'}"
                yield pytest.param(make, config, even, marks=[*marks, *slow], id=label)


@pytest.mark.parametrize(("make", "config", "even"), [*_compiled()])
def test_a_tuned_configuration_compiles_to_the_right_thing(
    make: Callable[[], Executor], config, even
):
    changes = {"M": 144, "K": 192, "N": 272, "R": 16} if even else {}
    with started(make()) as executor:
        _check_alone(config, executor, **changes)


def _tuned() -> Iterator[object]:
    for arch in (80, 89, 90, 100, 120):
        for config in launch_policy.other_gemms(8192, N, BF16, arch):
            # GROUP_M changes the order of tiles alone.
            quick = (arch, config.BLOCK_N, config.GROUP_M) == (90, 256, 8)
            slow = [] if quick else [pytest.mark.exhaustive]
            yield pytest.param(arch, config, marks=slow, id=f"sm_{arch}-{_short(config)}")


@pytest.mark.offline
@pytest.mark.parametrize(("arch", "config"), [*_tuned()])
def test_a_tuned_configuration_fits_the_device(arch, config):
    """Forward and dX of 4096 × 4096, dX of a group, and where it is wide with a gain: no spilled
    register, tensor cores."""
    x, W, A, B, layer = _operands()
    launches = [
        lambda: ticketed_gemm.forward(x, W, A, B, 2.0, dropout=Dropout(0.1), config=config),
        lambda: ticketed_gemm.grad_input([layer], config=config),
        lambda: ticketed_gemm.grad_input([layer] * 2, config=config),
    ]
    if config in launch_policy.other_gemms(8192, N, BF16, arch, has_gain=True):
        g = Gains(g=_meta(N, dtype=FP32))
        launches += [
            lambda: ticketed_gemm.forward(
                x, W, A, B, 2.0, gains=g, saves_V=True, config=config
            ),
            lambda: ticketed_gemm.grad_input([layer], gains=g, config=config),
        ]  # fmt: skip
    _assert_fit(arch, config, launches)


@pytest.mark.offline
def test_a_tuned_tile_that_masks_dX_fits_the_device():
    """Of a layer, of one with a gain, of a group."""
    _, _, _, _, layer = _operands()
    cases = [([layer], NO_GAINS), ([layer], Gains(g=_meta(N, dtype=FP32))), ([layer] * 2, NO_GAINS)]
    for config in launch_policy.other_gemms(8192, N, BF16, 90, masks_dX=True):
        launches = [
            functools.partial(
                ticketed_gemm.grad_input, layers, Dropout(0.1), gains=gains, config=config
            )
            for layers, gains in cases
        ]
        _assert_fit(90, config, launches)


def _meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _operands() -> tuple[Any, ...]:
    M, K, R = 8192, 4096, 16
    A, B = _meta(R, K, dtype=FP32), _meta(N, R, dtype=FP32)
    x, dY, W, partials = _meta(M, K), _meta(M, N), _meta(N, K), _meta(16, M, R, dtype=FP32)
    return x, W, A, B, Layer(dY, W, A, B, 2.0, partials)


def _assert_fit(arch: int, config: GemmConfig, launches: list[Callable[[], Any]]) -> None:
    with stub_driver.recording(arch) as log:
        for launch in launches:
            launch()
    limits = resources.limits_of(arch)
    assert len(log.kernels) == len(launches)
    for kernel in log.kernels:
        found = kernel.resources
        assert kernel.num_stages == config.num_stages, "dropped to a smaller one"
        assert found.local_bytes == 0, found
        assert found.shared_bytes <= limits.shared_per_block
        assert set(found.mma) == {limits.mma}


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_tuned_is_not_what_is_picked(arch):
    for M in (128, 8192):
        others = launch_policy.other_gemms(M, N, BF16, arch)
        assert others
        assert launch_policy.pick_gemm(M, BF16, arch) not in others
