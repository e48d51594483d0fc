"""Counts and sizes in three digits and the unit that fits."""

from __future__ import annotations

import pytest

from lora_fast.magnitudes import short_count, short_size


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0"),
        (512, "512"),
        (999, "999"),
        (1000, "1 K"),
        (49_152, "49.2 K"),
        (999_499, "999 K"),
        # Rounded, it has one of the next unit.
        (999_500, "1 M"),
        (1_235_000, "1.24 M"),
        (41_940_000, "41.9 M"),
        (8_030_261_248, "8.03 B"),
        (3_100_000_000_000, "3.1 T"),
        (1_234_500_000_000_000, "1234 T"),
    ],
)
def test_a_count_has_the_unit_that_fits(count: int, words: str) -> None:
    assert short_count(count) == words


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (235e6, "235 MB"), (3.44e12, "3.44 TB")],
)
def test_sizes_are_in_steps_of_a_thousand(size: float, words: str) -> None:
    assert short_size(size) == words
