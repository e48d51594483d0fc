"""The pictures of bench: a page wide, nothing cut, at the number of cases that a day has."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from pictures import check_all, kept_figures

pytest.importorskip("triton")
pytest.importorskip("peft")

from bench.gpu_day import plots
from bench.offline import __main__ as offline
from bench.offline import plots as offline_plots

SIZES = ((4096, 4096), (4096, 14336), (14336, 4096))
LINEARS = list(
    itertools.product(
        ("dense", "nf4"), (8192, 2048, 512), SIZES, (16, 64), ("forward", "forward+backward")
    )
)


class Modelled:
    """Replaces the modelled numbers: the same for every case."""

    def over_floor(self, row: dict[str, Any], who: str) -> float | None:
        return {"peft": 1.45, "lora_fast fused": 1.07, "peft fp32": 2.2}.get(who)


def timed(ratio: float) -> dict[str, Any]:
    numbers = {"median": ratio, "low": 0.98 * ratio, "high": 1.02 * ratio}
    return {
        "eager": {"seconds": {k: 1e-3 * v for k, v in numbers.items()}, "over_baseline": numbers}
    }


def row(names: dict[str, float], **facts: Any) -> dict[str, Any]:
    contestants = {name: timed(value) for name, value in names.items()}
    return {"baseline": "frozen", "p": 0.0, "contestants": contestants, **facts}


@pytest.fixture
def results() -> dict[str, Any]:
    """Made-up times of a day: 72 linears, some faster than the floor, and one that failed."""
    draw = random.Random(1)
    linears: dict[str, Any] = {}
    for weight, M, (K, N), R, direction in LINEARS:
        ours = 0.6 if (weight, M) == ("nf4", 512) else 1.03
        names = {
            "frozen": 1.0, "peft": draw.uniform(1.2, 2), "peft fp32": draw.uniform(1.5, 3),
            "lora_fast": ours, "lora_fast fused": 1.01 * ours, "lora_fast torch": 1.3 * ours,
        } | ({"bitsandbytes": 1.0} if weight == "nf4" else {})  # fmt: skip
        unit = f"{weight} bfloat16 M{M} K{K} N{N} R{R} {direction}"
        linears[unit] = row(names, M=M, K=K, N=N, R=R, weight=weight, direction=direction)
    first = copy.deepcopy(next(iter(linears.values())))
    first["contestants"]["peft fp32"] = {"failed": "out of memory"}
    linears[next(iter(linears))] = first
    routes = {
        f"nf4 bfloat16 M{M} K{K} N{N} R16 {direction}": row(
            {who: (0.02 + M * 1e-4 * i) for i, who in enumerate(plots._ROUTES, 1)},
            M=M, K=K, N=N, direction=direction,
        )
        for M, (K, N), direction in itertools.product(
            (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), SIZES[:2], ("forward", "forward+backward")
        )
    }  # fmt: skip
    layers = {
        f"{name} {weight} M{M} R16 p{p}": row(
            {who: draw.uniform(1, 2) for who in plots._COLOURS},
            layer=name,
            weight=weight,
            M=M,
            R=16,
        )
        for name, weight, M, p in itertools.product(
            ("Llama-3-8B", "Qwen3-8B"), ("dense", "nf4"), (8192, 2048), (0.0, 0.1)
        )
    }
    steps = {"layers": layers, "linears": linears, "crossover": routes}
    return {
        "note": "MADE UP",
        "calls": [{"name": "NVIDIA H100 80GB HBM3"}],
        "steps": {name: {"rows": rows} for name, rows in steps.items()},
    }


def test_a_day_of_72_linears_can_be_read(results: dict[str, Any], tmp_path: Path) -> None:
    modelled: Any = Modelled()
    names = ["layers", "crossover", "modelled", "linears-dense", "linears-nf4"]
    written = check_all(lambda: plots.draw(results, modelled, tmp_path), count=len(names))
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(names)
    for texts in written:
        assert any(text.startswith("MADE UP") and "NVIDIA H100" in text for text in texts)
    dense, nf4 = (dict.fromkeys(texts) for texts in written[3:])
    for texts in (dense, nf4):
        assert {"forward", "forward + backward", "M512 K14336 N4096 R64", "modelled"} <= set(texts)
    assert "failed" in dense and "failed" not in nf4


def test_what_is_faster_than_the_floor_has_a_bar(results: dict[str, Any], tmp_path: Path) -> None:
    modelled: Any = Modelled()
    with kept_figures() as figures:
        plots.draw(results, modelled, tmp_path)
        widths = [p.get_width() for axes in figures[4].axes for p in axes.patches]
    assert sum(abs(width - 0.6) < 1e-9 for width in widths) == 12  # of 512 rows


def test_nothing_is_drawn_of_what_was_not_modelled(results: dict[str, Any], tmp_path: Path) -> None:
    modelled: Any = Modelled()
    modelled.over_floor = lambda row, who: None
    plots.draw(results, modelled, tmp_path)
    assert not (tmp_path / "modelled.png").exists()


def test_the_counted_pictures_can_be_read(tmp_path: Path) -> None:
    kept = offline._load(offline.RESULTS / offline.FILE)
    bars, roof = check_all(lambda: offline_plots.draw(kept["counts"], tmp_path), count=2)
    for texts in (bars, roof):
        assert any("counted and modelled, not measured" in text for text in texts)
    assert {"unsloth (model)", "lorafusion (model)", "peft fp32", "frozen layer"} <= set(bars)
    assert {"ticketed_gemm", "strips", "mm"} <= set(roof)
