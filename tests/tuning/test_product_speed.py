"""e, Triton's speed beside cuBLAS's: published ranges, and the file of measured values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from lora_fast.kernels import launch_policy

from lora_fast.tuning import product_speed
from lora_fast.tuning.product_speed import Row

TILE = launch_policy.pick_gemm(8192, torch.bfloat16, 90)
NAME = product_speed.tile_name(TILE)
ROWS = [
    Row("forward", 8192, 4096, 4096, NAME, 0.83),
    Row("forward", 2048, 4096, 4096, NAME, 0.71),
    Row("dX", 8192, 4096, 4096, NAME, 0.9),
]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in place of the package's, with rows of sm_90."""
    path = tmp_path / "measured_e.json"
    product_speed.write(path, 90, "H100", {"triton": "3.7"}, ROWS)
    monkeypatch.setattr(product_speed, "FILE", path)
    product_speed._measured.cache_clear()
    yield path
    product_speed._measured.cache_clear()


@pytest.mark.parametrize("arch", [None, 75, 80, 86, 89, 90, 100, 103, 120])
def test_every_architecture_has_a_range_with_its_source(arch):
    low, high, source = product_speed.published(arch)
    assert 0.5 < low < high < 1.0
    assert source
    assert not product_speed.is_measured(arch)
    assert product_speed.e_of(TILE, arch, "forward", 8192, 4096, 4096) == (low + high) / 2


def test_what_is_written_is_read(measured):
    assert product_speed.read(measured) == {"90": tuple(ROWS)}
    product_speed.write(measured, 80, "A100", {}, ROWS[:1])
    product_speed.write(measured, 90, "H100", {}, ROWS[1:])
    assert product_speed.read(measured) == {"80": tuple(ROWS[:1]), "90": tuple(ROWS[1:])}


def test_the_nearest_size_of_the_same_tile_and_direction_counts(measured):
    def e(direction, M, tile=TILE):
        return product_speed.e_of(tile, 90, direction, M, 4096, 4096)

    assert product_speed.is_measured(90) and not product_speed.is_measured(100)
    assert [e("forward", M) for M in (16384, 8192, 1024)] == [0.83, 0.83, 0.71]
    assert e("dX", 1024) == 0.9
    (wide, *_) = launch_policy.other_gemms(8192, 4096, torch.bfloat16, 90)
    assert e("forward", 8192, wide) == pytest.approx((0.76 + 0.97) / 2)


BROKEN = [
    "", "[]", "{}", '{"format": 2, "measured": {}}', '{"format": 1, "measured": []}',
    json.dumps({"format": 1, "measured": {"90": {}}}),
    *(
        json.dumps({"format": 1, "measured": {"90": {"rows": [{**ROWS[0]._asdict(), **bad}]}}})
        for bad in ({"e": 0.0}, {"e": "x"}, {"M": 0}, {"K": 1.5}, {"tile": 3}, {"more": 1},
                    {"direction": "backward"})
    ),
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_a_file_of_another_form_is_an_error(tmp_path, text):
    path = tmp_path / "e.json"
    path.write_text(text)
    with pytest.raises(ValueError):
        product_speed.read(path)


def test_no_file_is_nothing_measured(tmp_path):
    assert product_speed.read(tmp_path / "none.json") == {}


def test_the_file_of_the_package_is_one():
    product_speed.read(product_speed.FILE)
