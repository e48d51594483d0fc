"""Occupancy arithmetic; test_stub_driver.py tests the values read from compiled code."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from bench.instruments import resources


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "ctas"),
    [
        (90, 128, 98304, 256, 2),  # registers and shared memory both allow two
        (90, 128, 120000, 256, 1),  # 2 × (120000 + 1024) exceeds 228 KiB
        (90, 129, 0, 256, 1),  # 129 registers are allocated as 136
        (90, 32, 0, 1024, 2),  # threads: 2048
        (90, 16, 0, 32, 32),  # CTAs: 32
        (89, 32, 0, 512, 3),  # threads: 1536
        (86, 16, 0, 32, 16),
        (80, 255, 166912, 128, 1),
    ],
)
def test_the_scarcest_resource_decides(
    arch: int, registers: int, shared: int, threads: int, ctas: int
) -> None:
    assert resources.ctas_per_sm(arch, registers, shared, threads) == ctas


def test_a_block_and_the_driver_s_share_fit_the_multiprocessor() -> None:
    for limits in resources.LIMITS.values():
        assert limits.shared_per_block + limits.shared_reserved <= limits.shared_per_sm


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"arch must be one of .* got 70"):
        resources.limits_of(70)
