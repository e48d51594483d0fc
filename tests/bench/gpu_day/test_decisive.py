"""The first step of a GPU day: each alternative computes the layer; a tile is timed or left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_fast.kernels import launch_policy, strips

from bench.gpu_day import absent, commands, decisive, measured_e, report, tables
from bench.gpu_day.day import Day, day
from bench.gpu_day.decisive import Operands
from bench.gpu_day.steps import STEPS
from bench.instruments.accuracy import assert_accurate
from lora_fast import reference
from lora_fast.tuning import product_speed
from lora_fast.tuning.product_speed import Row, tile_name

ROOT = Path(__file__).resolve().parents[3]
ON_A_GPU = Day(torch.device("cuda", 0), 90, rehearsal=False)


@pytest.fixture
def today() -> Iterator[Day]:
    with day(rehearse=True) as made:
        yield made


def operands(today: Day) -> Operands:
    return Operands.random(today, 24, 48, 40)


def exact(o: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and dX for the dS that is given, in float64."""
    x, W, A, B, dY, dS = (t.double() for t in (o.x, o.W, o.A, o.B, o.dY, o.dS))
    y = reference.adapted_linear(x, W, A=A, B=B, scaling=decisive._SCALING)
    return y, dY @ W + dS @ A


def eager(o: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    y = o.x @ o.W.T + decisive._SCALING * ((o.x @ o.A.T) @ o.B.T)
    return y, o.dY @ o.W + o.dS @ o.A


def test_every_way_that_is_written_out_computes_the_layer(today: Day) -> None:
    o = operands(today)
    makes: tuple[Callable[[Operands], dict[str, Any]], ...]
    makes = (decisive.forward_ways, decisive.grad_input_ways)
    for make, ref, yardstick in zip(makes, exact(o), eager(o), strict=True):
        for name, way in make(o).items():
            for _ in range(2):  # nothing of the first call adds to the second
                assert_accurate(way(), ref, yardstick, name=name, compute_dtype=torch.bfloat16)


@pytest.mark.interpreter
def test_the_kernels_that_are_timed_compute_the_layer() -> None:
    with day(rehearse=True) as today:
        assert today.fused == "triton"
        o = Operands.random(today, 72, 48, 40)  # rows for which there are other tiles
        found: dict[str, Any] = {}

        def timed(today: Day, makers: dict[str, Any], M: int, K: int, N: int) -> dict[str, Any]:
            found.update({name: make()() for name, make in makers.items()})
            return {}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decisive, "_row", timed)
            patch.setattr(Operands, "random", lambda *_: o)
            decisive._forward(today, 72, 48, 40)
            tiles = [name for name in found if name == "lora_fast" or "x64/" in name]
            assert len(tiles) > 3
            for name in tiles:
                y, _, _ = found[name]
                ref, yardstick = exact(o)[0], eager(o)[0]
                assert_accurate(y, ref, yardstick, name=name, compute_dtype=torch.bfloat16)


def test_it_comes_first_and_the_host_within_the_first_size() -> None:
    assert STEPS[0].name == "decisive"
    names = [unit.name for unit in decisive.units(ON_A_GPU)]
    assert [name.split()[0] for name in names[:5]] == ["forward", "dX", "strips", "host", "forward"]
    assert len(names) == 3 * len(decisive._SIZES) + 1


def test_hopper_is_asked_what_its_defaults_hang_on() -> None:
    names = list(decisive._tiles(ON_A_GPU, 8192, 4096, lambda config: None))
    assert names[0] == "lora_fast"
    for part in (
        r"128x256x64/8/3 descriptors$",
        r"128x256x64/8/4 descriptors$",
        r"128x256x64/8/4 .*groups of 16",
        r"128x128x64/8/3 .*groups of 16",
        r"8/3$",
    ):
        assert any(re.search(part, name) for name in names), (part, names)
    picked = launch_policy.pick_gemm(8192, torch.bfloat16, 90, R=16)
    assert tile_name(picked) not in names
    assert decisive._tiles(replace(ON_A_GPU, fused="torch"), 8192, 4096, lambda config: None) == {}


@pytest.mark.offline
def test_a_tile_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches fall back to a smaller one, whose time would appear under its name."""
    monkeypatch.setenv("LORA_FAST_STUB_ARCH", "89")
    too_large = launch_policy.GemmConfig(128, 256, 64, 64, 8, num_warps=8, num_stages=4)
    monkeypatch.setattr(launch_policy, "other_gemms", lambda *arguments: (too_large,))
    with day(rehearse=True) as today:
        row = decisive._forward(today, 128, 256, 256)
    contestants = row["contestants"]
    assert row["ok"] and "graph" in contestants["lora_fast"]
    assert "OutOfResources" in contestants[tile_name(too_large)]["failed"]
    assert tile_name(too_large) not in row["summary"]


@pytest.mark.offline
def test_strips_are_timed_with_other_numbers_of_ctas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FAST_STUB_ARCH", "90")
    before, seen = launch_policy.strip_ctas(90), []
    real = strips.row_ranges

    def noting(*arguments: int) -> tuple[int, int]:
        seen.append(launch_policy.strip_ctas(90))
        return real(*arguments)

    monkeypatch.setattr(strips, "row_ranges", noting)
    with day(rehearse=True) as today:
        row = decisive._strips(today, 256, 512, 512)
    others = {128, 264, 528} - {before}
    assert set(row["contestants"]) == {"products", "lora_fast", *(f"{c} CTAs" for c in others)}
    assert set(seen) == {128, 264, 528}
    assert before == launch_policy.strip_ctas(90)


def _timed(over_cublas: float) -> dict[str, Any]:
    ratio = {"median": over_cublas, "low": 1.0, "high": 1.0}
    return {"graph": {"seconds": {"median": over_cublas * 1e-3}, "over_baseline": ratio}}


@pytest.mark.parametrize("note", [None, report.REHEARSAL], ids=["measured", "rehearsed"])
def test_the_library_reads_the_e_that_was_measured(
    note: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picked = launch_policy.pick_gemm(8192, torch.bfloat16, 90, R=16)
    (wide, *_) = launch_policy.other_gemms(8192, 4096, torch.bfloat16, 90)
    row = {
        "direction": "forward", "M": 8192, "K": 4096, "N": 14336, "tile": tile_name(picked),
        "contestants": {
            "cuBLAS": _timed(1.0), "hybrid": _timed(1.1), "lora_fast hybrid": _timed(1.09),
            "lora_fast": _timed(1.25), tile_name(wide): _timed(1.05),
            tile_name(replace(picked, GROUP_M=16)): {"failed": "OutOfResources: …"},
        },
    }  # fmt: skip
    rows = {"forward": row, "dX": {**row, "direction": "dX"}, "host": {"host_seconds": {}}}
    call = {"name": "H100", "capability": [9, 0], "torch": "2.13", "triton": "3.7.1"}
    results = {"note": note, "calls": [call], "steps": {"decisive": {"rows": rows}}}
    monkeypatch.setattr(product_speed, "FILE", tmp_path / "package.json")
    product_speed._measured.cache_clear()
    found = measured_e.write(results, tmp_path)
    assert found == [tmp_path / "measured_e.json", *([] if note else [tmp_path / "package.json"])]
    assert product_speed.read(found[0])["90"] == tuple(
        Row(direction, 8192, 4096, 14336, tile_name(tile), e)
        for direction in ("forward", "dX")
        for tile, e in ((picked, 0.8), (wide, 0.9524))
    )
    assert product_speed.is_measured(90) == (note is None)
    if note is None:
        assert product_speed.e_of(wide, 90, "dX", 8192, 4096, 4096) == 0.9524
    product_speed._measured.cache_clear()


def test_without_kernels_there_is_nothing_to_write(tmp_path: Path) -> None:
    results = {"note": None, "calls": [], "steps": {"decisive": {"rows": {"host": {}}}}}
    assert measured_e.write(results, tmp_path) == [] and list(tmp_path.iterdir()) == []


def test_the_first_minutes_then_a_few_tests_then_layers() -> None:
    names = [step.name for step in STEPS]
    assert names[:4] == ["decisive", "first_tests", "layers", "candidates"]
    first = {unit.name for unit in commands.first_gpu_tests(ON_A_GPU)}
    assert all((ROOT / name).is_file() for name in first) and len(first) == 3


def test_the_host_is_timed_without_peft_too(today: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    found = decisive._host(today)["host_seconds"]
    assert {"PyTorch, written out", "lora_fast, torch", "PEFT", "lora_fast, PEFT"} == set(found)
    real = absent.is_there
    monkeypatch.setattr(absent, "is_there", lambda name: name != "peft" and real(name))
    assert set(decisive._host(today)["host_seconds"]) == {
        "PyTorch, written out", "lora_fast, torch",
    }  # fmt: skip


def test_e_is_above_1_for_what_is_faster_than_the_floor() -> None:
    def times(seconds: float) -> dict[str, Any]:
        ratio = {"median": seconds / 2e-3, "low": 1.0, "high": 1.0}
        return {"graph": {"seconds": {"median": seconds}, "over_baseline": ratio}}

    row = {
        "contestants": {"cuBLAS": times(2e-3), "lora_fast": times(2.5e-3), "tile": {"failed": "…"}},
        "baseline": "cuBLAS",
        "work": {"flops": 4 * 10**11, "bytes": None},
    }
    host = {"host_seconds": {"PEFT": 180e-6}}
    lines = tables.decisive({"forward": row, "host": host}).splitlines()
    assert "| forward | lora_fast | 2.5000 | 0.800 | 160 | - |" in lines
    assert "| forward | tile | failed | - | - | - |" in lines
    assert "| host | PEFT | 0.1800 | - | - | - |" in lines
    assert decisive._said(row, decisive._e) == "cuBLAS 1.000, lora_fast 0.800"
