"""The fast part of ``python -m bench.offline --check``: our launches and machine code on sm_90;
and that the full list has every shipped configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("peft")
from lora_fast.kernels import launch_policy
from triton.runtime.jit import JITFunction

from bench.offline import __main__ as command
from bench.offline import (
    band,
    contestants,
    counting,
    issue,
    layers,
    machine_code,
    regression,
    variants,
    whole_layer,
)
from bench.offline.contestants import Case
from lora_fast.factors import Needs
from lora_fast.tuning import cost_model
from lora_fast.tuning.plans import BACKWARD, FORWARD, Query
from lora_fast.tuning.rooflines import BY_ARCH

pytestmark = [pytest.mark.offline, pytest.mark.usefixtures("allocating_as_users_do")]

ONE_LINEAR = dataclasses.replace(counting.FAST, shapes=layers.SHAPES[:1])


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return command._load(command.RESULTS / command.FILE)


@pytest.mark.pinned
def test_nothing_became_worse(kept: dict[str, Any]) -> None:
    new = {"counts": counting.lora_fast(counting.FAST, 90), **counting.code(ONE_LINEAR, 90)}
    assert len(new["counts"]) == 16
    assert len(new["kernels"]) >= 12
    assert {row["M"] for row in new["launches"]} == {variants.IN_GEMM_ROWS, 8192}
    assert regression.regressions(new, kept) == []


def test_an_extra_launch_and_a_copy_of_x_are_found(
    kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lora_fast.peft_layers.plain_lora as plain_lora

    run = plain_lora.run
    monkeypatch.setattr(plain_lora, "run", lambda x, *operands: run(x * 1, *operands))
    one = dataclasses.replace(ONE_LINEAR, weights=("dense",), dropouts=(0.0,))
    new = {"counts": counting.lora_fast(one, 90), "launches": [], "kernels": []}
    found = regression.regressions(new, kept)
    assert any("launches forward" in line for line in found)
    assert any("bytes moved" in line for line in found)


@pytest.mark.parametrize("arch", [80, 90])
def test_tiles_and_instructions_agree_on_the_products_of_a_loop(arch: int) -> None:
    case = Case(layers.SHAPES[0], 8192, 16, "dense", 0.0)
    _, log = contestants.LoraFast(case).step(case, arch, fused=True)
    for launch in log.launches:
        part = "gemm" if launch.name == "ticketed_gemm" else "walk"
        loop = issue.loop_of(launch, part)
        assert loop is not None
        flops = issue.flops_of_instructions(loop, launch.kernel.num_warps)
        wanted = issue.loop_flops(launch)
        if arch == 80 and launch.name == "strips":
            # A tile of dS is narrower than its eight warps, which mma.sync makes repeat products.
            assert wanted <= flops <= 2 * wanted, machine_code.role(launch)
        else:
            assert flops == wanted, machine_code.role(launch)


def test_the_breakdown_adds_up_to_the_counted_bytes(kept: dict[str, Any]) -> None:
    rows = counting.breakdown(counting.MAIN, 90)
    total = sum(row["read"] + row["written"] for row in rows)
    _, row = counting.lora_fast(
        dataclasses.replace(ONE_LINEAR, weights=("dense",), dropouts=(0.0,)), 90
    )
    assert row["who"] == "lora_fast fused"
    assert total == row["bytes"]
    assert row["compulsory_bytes"] < row["bytes"] < row["issued_bytes"]


def test_the_variants_launch_every_shipped_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = set()

    def launch(kernel: Any, *args: Any, **options: Any) -> None:
        tiles = options["TILES"]._asdict() if "TILES" in options else {}
        launched.add((kernel.fn.__name__, *_tile({**options, **tiles})))

    monkeypatch.setattr(JITFunction, "run", launch)
    shipped: set[tuple[Any, ...]] = set()
    for arch in counting.EVERYTHING.code_archs:
        for _ in variants.record(tuple(variants.KINDS), arch, (16, 64), (0.0, 0.1)):
            pass
        shipped |= {("ticketed_gemm", *_tile(vars(c))) for c in _gemm_configs(arch)}
        shipped |= {("strips", *_tile(vars(c))) for c in _strip_configs(arch)}
    assert len(shipped) > 15
    assert shipped - launched == set()
    assert {"nf4_decode", "row_norms", "weight_update"} <= {name for name, *_ in launched}


def _gemm_configs(arch: int) -> list[launch_policy.GemmConfig]:
    """What launch_policy.py may pick for a device, and what the tuner may try."""
    picked = [
        launch_policy.pick_gemm(M, dtype, arch, has_gain=has_gain, R=R)
        for M in (16, 64, 8192)
        for dtype in (torch.bfloat16, torch.float32)
        for has_gain in (False, True)
        for R in (16, 100)
    ]
    return [*picked, *launch_policy.other_gemms(8192, 4096, torch.bfloat16, arch)]


def _strip_configs(arch: int) -> list[launch_policy.StripConfig]:
    dtypes = (torch.bfloat16, torch.float32)
    return [launch_policy.pick_strips(dtype, R, arch) for dtype in dtypes for R in (16, 64)]


def _tile(values: Any) -> tuple[int, ...]:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_L", "BLOCK_K", "num_warps", "num_stages")
    return tuple(values[name] for name in names if name in values)


def test_a_whole_layer_saves_what_is_kept(kept: dict[str, Any]) -> None:
    assert whole_layer.rows() == kept["whole_layers"]


def test_only_products_with_W_have_a_tile() -> None:
    """At e = 0.85 a linear of our own kernels takes longer where W is multiplied, and elsewhere
    not; on the default route it does not depend on e."""
    case, a100 = counting.MAIN, BY_ARCH[80]
    ours = contestants.LoraFast(case)
    fused, _ = ours.step(case, 80, fused=True)
    assert [op.tile is not None for op in fused.operations] == [True, False, True, False]
    slower = a100.total(fused.operations, band.SLOW) - a100.total(fused.operations)
    products = a100.total(op for op in fused.operations if op.tile is not None)
    assert slower == pytest.approx((1 / band.SLOW - 1) * products, rel=0.01)
    default, _ = ours.step(case, 80)
    assert a100.total(default.operations, band.SLOW) == a100.total(default.operations)


@pytest.mark.parametrize("weight", ["dense", "nf4"])
def test_the_model_of_the_tuner_and_the_recorded_step_agree(weight: str) -> None:
    """One cost model: from the query alone, and from what was launched."""
    case = Case(layers.SHAPES[0], 8192, 16, weight, 0.0)
    step, _ = contestants.LoraFast(case).step(case, 90)
    recorded = band.seconds(step.operations, BY_ARCH[90], 1.0)
    kind = (torch.bfloat16,) if weight == "dense" else ((64, True),)
    query = Query(
        FORWARD, 8192, 4096, (4096,), (16,), torch.bfloat16, torch.bfloat16, kind, (False,) * 6,
        (Needs(),), True,
    )  # fmt: skip
    backward = query._replace(op=BACKWARD, needs=(Needs(x=True, A=True, B=True),))
    modelled = sum(cost_model.seconds(cost_model.pick(q, 90), q, 90) for q in (query, backward))
    assert modelled == pytest.approx(recorded, rel=0.002)


def test_the_kernels_of_the_routes_have_names_of_their_own_and_spill_nothing() -> None:
    found = variants.record(("routes",), 90, (16,), (0.0, 0.1))
    rows = machine_code.rows(found, 90)
    roles = {" ".join(row["kernel"].split()[1:3]) for row in rows}
    assert roles == {"shrink r16", "S Q", "dS A", "nf4_decode_augmented fp32"}
    assert [row["kernel"] for row in rows if row["spilled_bytes"]] == []
