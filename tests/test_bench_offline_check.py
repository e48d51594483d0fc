"""The fast part of ``python -m bench.offline --check``: our launches and machine code on sm_90."""

from __future__ import annotations

import dataclasses
from typing import Any

import conftest
import pytest

pytest.importorskip("triton")
pytest.importorskip("peft")
from bench.offline import __main__ as command
from bench.offline import contestants, counting, layers, machine_code, regression
from bench.offline.contestants import Case

pytestmark = pytest.mark.offline

ONE_LINEAR = dataclasses.replace(counting.FAST, shapes=layers.SHAPES[:1])


@pytest.fixture(autouse=True)
def _allocating_as_users_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills new memory with NaN in tests would be counted as launches."""
    for owner, name in conftest.ALLOCATORS:
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return command._load(command.RESULTS / command.FILE)


def test_nothing_became_worse(kept: dict[str, Any]) -> None:
    new = {
        "counts": counting.lora_fast(counting.FAST, 90),
        "kernels": counting.code(ONE_LINEAR, 90),
    }
    assert len(new["counts"]) == 8
    assert len(new["kernels"]) >= 7
    assert regression.regressions(new, kept) == []


def test_an_extra_launch_and_a_copy_of_x_are_found(
    kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lora_fast.peft_layers.lora_layers as lora_layers

    adapted = lora_layers.adapted
    monkeypatch.setattr(
        lora_layers, "adapted", lambda base, x, **factors: adapted(base, x * 1, **factors)
    )
    one = dataclasses.replace(ONE_LINEAR, weights=("dense",), dropouts=(0.0,))
    new = {"counts": counting.lora_fast(one, 90), "kernels": []}
    found = regression.regressions(new, kept)
    assert any("launches forward" in line for line in found)
    assert any("bytes moved" in line for line in found)


@pytest.mark.parametrize("arch", [80, 90])
def test_tiles_and_instructions_agree_on_the_products_of_a_loop(arch: int) -> None:
    case = Case(layers.SHAPES[0], 8192, 16, "dense", 0.0)
    _, log = contestants.LoraFast(case).step(case, arch)
    for launch in log.launches:
        part = "gemm" if launch.name == "ticketed_gemm" else "walk"
        loop = machine_code.loop_of(launch, part)
        assert loop is not None
        flops = machine_code.flops_of_instructions(loop, launch.kernel.num_warps)
        wanted = machine_code.loop_flops(launch)
        if arch == 80 and launch.name == "strips":
            # A tile of dS is narrower than its eight warps, which mma.sync makes repeat products.
            assert wanted <= flops <= 2 * wanted, machine_code.role(launch)
        else:
            assert flops == wanted, machine_code.role(launch)


def test_the_breakdown_adds_up_to_the_counted_bytes(kept: dict[str, Any]) -> None:
    rows = counting.breakdown(counting.MAIN, 90)
    total = sum(row["read"] + row["written"] for row in rows)
    (row,) = counting.lora_fast(
        dataclasses.replace(ONE_LINEAR, weights=("dense",), dropouts=(0.0,)), 90
    )
    assert total == row["bytes"]
    assert row["compulsory_bytes"] < row["bytes"] < row["issued_bytes"]
