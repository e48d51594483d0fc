"""The modelled time of a pass: products, memory, and the shared memory and L2 of a tile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from lora_fast.kernels import launch_policy

from lora_fast.tuning.counts import Work
from lora_fast.tuning.rooflines import (
    BY_ARCH,
    EXPOSED_C,
    ROOFLINES,
    l2_bytes,
    roofline_of,
    shared_bytes,
    tensor_clocks,
)

BF16 = torch.bfloat16
H100 = BY_ARCH[90]
TILE = launch_policy.pick_gemm(8192, BF16, 90)
WIDE = launch_policy.other_gemms(8192, 4096, BF16, 90)[0]


@pytest.mark.parametrize("roofline", ROOFLINES, ids=lambda r: r.name)
def test_clocks_and_multiprocessors_make_the_peak(roofline):
    per_clock = {80: 2048, 89: 512, 90: 4096, 100: 8192}[roofline.arch]
    assert roofline.tensor_per_clock == pytest.approx(per_clock, rel=0.01)


@pytest.mark.parametrize("roofline", ROOFLINES, ids=lambda r: r.name)
def test_what_is_attained_is_less_than_the_peak_and_has_a_source(roofline):
    assert 0.5 < roofline.attained_flops < 1.0
    assert 0.5 < roofline.attained_bytes < 1.0
    assert roofline.attained_source


def test_the_slower_of_products_and_memory_sets_the_time():
    product, copy = Work(int(798e12), 1), Work(1, int(3.0e12))
    assert H100.seconds(product) == pytest.approx(1.0, rel=1e-3)
    assert H100.seconds(copy) == pytest.approx(1.0, rel=1e-3)
    assert H100.seconds(replace(product, issue_seconds=3.0)) == 3.0
    assert H100.total([product, copy]) == pytest.approx(2.0, rel=1e-3)


def test_a_matrix_that_cublas_adds_to_is_read_in_part_beside_the_product():
    product = Work(int(798e12), 1)
    added = replace(product, added_to=int(3.0e12))
    assert H100.seconds(added) - H100.seconds(product) == pytest.approx(EXPOSED_C, rel=1e-2)


def test_a_slower_triton_slows_what_has_a_tile():
    work = Work(int(798e12), 1, tile=WIDE)
    assert H100.seconds(work, 0.85) == pytest.approx(1 / 0.85, rel=1e-3)
    assert H100.seconds(replace(work, tile=None), 0.85) == pytest.approx(1.0, rel=1e-3)


def test_a_hopper_tile_of_128_columns_is_bound_by_shared_memory_and_l2():
    """160 bytes per clock, where a multiprocessor has 128; of 256 columns it is 128."""
    per_clock = [shared_bytes(tile, 90) / tensor_clocks(tile, 4096) for tile in (TILE, WIDE)]
    assert per_clock == [160.0, 128.0]
    # L2: 64 and 48 bytes per clock and multiprocessor, of 40 that are to be had.
    to_be_had = 9.7e12 / (132 * 1.83e9)
    assert [H100.stretch(tile) for tile in (TILE, WIDE)] == pytest.approx(
        [64 / to_be_had, 48 / to_be_had], rel=1e-3
    )
    work = Work(int(H100.flops), 1, tile=TILE)
    assert H100.seconds(work) == pytest.approx(64 / to_be_had, rel=1e-3)
    assert replace(H100, l2=None).stretch(TILE) == pytest.approx(160 / 128, rel=1e-3)


def test_the_narrow_tile_of_a_second_accumulator_is_bound_by_reads_on_blackwell():
    narrow = launch_policy.pick_gemm(8192, BF16, 100, masks_dX=True)
    assert narrow.BLOCK_N == 64
    assert shared_bytes(narrow, 100) / tensor_clocks(narrow, 8192) == 192.0


def test_l2_stretches_no_default_tile_of_ampere_and_ada():
    """128 × 128 tiles read 32 (A100) and 8 (4090) bytes per clock and multiprocessor of it."""
    for arch, per_clock in ((80, 32), (89, 8)):
        roofline, tile = BY_ARCH[arch], launch_policy.pick_gemm(8192, BF16, arch)
        clocks = tensor_clocks(tile, roofline.tensor_per_clock)
        assert l2_bytes(tile) / clocks == pytest.approx(per_clock, rel=0.01)
        assert per_clock * roofline.multiprocessors * roofline.clock < roofline.l2


def test_every_device_has_a_roofline():
    archs = [None, 75, 80, 86, 89, 90, 100, 103, 120]
    assert [roofline_of(arch).name for arch in archs] == [
        "H100", "A100", "A100", "RTX 4090", "RTX 4090", "H100", "B200", "B200", "RTX 4090",
    ]  # fmt: skip
