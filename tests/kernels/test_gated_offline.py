"""The kernels of a gated MLP, every shipped configuration, compiled for absent GPUs: what they take
of a device, the products that they use, and that these are fenced and not serialised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from lora_fast.kernels import (
    gated_backward,
    gated_forward,
    gated_gradients,
    gated_policy,
    launch_policy,
    scaling,
)
from lora_fast.kernels.dropout import NO_DROPOUT, Dropout
from lora_fast.kernels.gated_tiles import Member
from lora_fast.kernels.triton_version import VERSION
from offline_launches import assert_walk_fits

from bench.instruments import stub_driver
from lora_fast.gated import ACTIVATIONS

ARCHS = [80, 89, 90, 100, 120]
# Triton before 3.7 sees multiples of 16 alone.
EIGHTS = 8 if VERSION >= (3, 7) else 16
# Bytes of local memory that no loop touches; with Triton 3.6 the forward kernel with dropout on
# sm_100 needs the most.
AWAY_FROM_LOOPS = 32 if VERSION >= (3, 7) else 48


@dataclass(frozen=True)
class Case:
    """A Llama-3-8B MLP; more rows make no other kernel."""

    R: int = 16
    p: float = 0.0
    activation: str = "silu"
    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.float32


PLAIN = Case()
# Those that take most registers of each configuration: all on sm_90, SAMPLE elsewhere.
CASES = {
    "plain": PLAIN,
    "dropout": replace(PLAIN, p=0.1),
    "r32-dropout": replace(PLAIN, R=32, p=0.1),
    "r64": replace(PLAIN, R=64),
    "r64-dropout": replace(PLAIN, R=64, p=0.1),
    "r8": replace(PLAIN, R=8),
    "r40": replace(PLAIN, R=32 + EIGHTS),
    "r20-dropout": replace(PLAIN, R=20, p=0.1),
    "float16-r32-dropout": replace(PLAIN, R=32, p=0.1, dtype=torch.float16),
    "float16": replace(PLAIN, dtype=torch.float16),
    "float16-dropout": replace(PLAIN, p=0.1, dtype=torch.float16),
    "float16-r64": replace(PLAIN, R=64, dtype=torch.float16),
    "float16-r100": replace(PLAIN, R=100, p=0.1, dtype=torch.float16),
    "float32": replace(PLAIN, dtype=torch.float32),
    "float32-r20-dropout": replace(PLAIN, R=20, p=0.1, dtype=torch.float32),
    "float32-r100": replace(PLAIN, R=100, dtype=torch.float32),
}
OTHERS = {
    **{f"{name}-dropout": replace(PLAIN, activation=name, p=0.1) for name in ACTIVATIONS},
    **{name: replace(PLAIN, activation=name) for name in ACTIVATIONS},
    "bfloat16-adapters": replace(PLAIN, adapter=torch.bfloat16),
    "gelu-r64": replace(PLAIN, R=64, activation="gelu", adapter=torch.bfloat16),
}


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of(arch: int, case: Case) -> stub_driver.Log:
    """Both directions."""
    M, I, R, dtype = 8192, 14336, case.R, case.dtype  # noqa: E741
    gate, up, dh = (_meta(M, I, dtype=dtype) for _ in range(3))
    S, A, B = _meta(M, R, dtype=dtype), *(_meta(*s, dtype=case.adapter) for s in ((R, I), (I, R)))
    members = Member(gate, S, B, 2.0), Member(up, S, B, 2.0)
    drops = Dropout(case.p, 3) if case.p else NO_DROPOUT
    dS = scaling.new_gradient(dh, R, 64)
    with stub_driver.recording(arch) as log:
        gated_forward.activate(*members, case.activation, A, drops)
        if gated_policy.fits_registers(dtype, [R] * 3, drops=case.p > 0.0):
            wanted = gated_backward.Wanted(True, True, True, True)
            gated_backward.gradients(
                *members, dh, case.activation, dS, A, drops, wanted=wanted, outs=(gate, up)
            )
        else:
            gated_gradients.gradients(
                *members, dh, case.activation, dS, A, drops, outs=(gate, up), stores_h=True
            )
    return log


SAMPLE = ("dropout", "r64-dropout", "float32")
# Triton 3.6 spills in the loop of gated_forward.
SPILLED = {(100, "dropout")}


def _marks(arch: int, name: str) -> list[pytest.MarkDecorator]:
    if (arch, name) in SPILLED:
        return [pytest.mark.pinned]
    in_sample = name in SAMPLE or (arch == 90 and name in CASES)
    return [] if in_sample else [pytest.mark.exhaustive]


MATRIX = [
    pytest.param(arch, case, id=f"sm_{arch}-{name}", marks=_marks(arch, name))
    for arch in ARCHS
    for name, case in {**CASES, **OTHERS}.items()
]


@pytest.mark.offline
@pytest.mark.parametrize(("arch", "case"), MATRIX)
def test_both_directions_fit_the_device(arch: int, case: Case) -> None:
    for launch in launches_of(arch, case).launches:
        multiplies = case.dtype != torch.float32
        assert_walk_fits(launch, arch, away_from_loops=AWAY_FROM_LOOPS, multiplies=multiplies)
        ptx = launch.kernel.text("ptx")
        # Full vectors, one address for eight elements and not for each; rows of S of other ranks
        # do not start at 16 bytes.
        assert case.R % EIGHTS or "global.b16" not in ptx, launch.name


@pytest.mark.offline
def test_the_cases_use_every_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    picked = set()
    # Of float16, too.
    monkeypatch.setattr(gated_policy, "VERSION", (3, 7))
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: picked.add(_key(kwargs)))
    for arch in ARCHS:
        for case in CASES.values():
            launches_of(arch, case)
    expected = {(c.BLOCK_M, c.BLOCK_L, getattr(c, "PARTS", None)) for c in gated_policy.OF_GATED}
    assert picked == expected


def _key(options: dict[str, Any]) -> tuple[int, int, int | None]:
    tiles = options["TILES"]
    return tiles.BLOCK_M, tiles.BLOCK_L, options.get("PARTS")


@pytest.mark.parametrize(
    ("dtype", "ranks", "drops", "fits"),
    [
        (torch.bfloat16, (64, 0, 40), True, True),
        (torch.bfloat16, (64, 33, 40), False, True),
        (torch.bfloat16, (64, 33, 40), True, False),
        (torch.bfloat16, (65, 8, 8), False, False),
        (torch.float16, (64, 64, 64), False, True),
        (torch.float16, (64, 64, 64), True, False),
        (torch.float16, (32, 0, 8), True, True),
        (torch.float16, (8, 5, 8), False, False),
        (torch.float32, (32, 5, 8), True, True),
        (torch.float32, (33, 5, 8), False, False),
    ],
)
def test_ranks_of_one_kernel(
    dtype: torch.dtype,
    ranks: tuple[int, ...],
    drops: bool,
    fits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gated_policy, "VERSION", (3, 7))
    assert gated_policy.fits_registers(dtype, ranks, drops=drops) == fits


def test_partials_of_dS_cost_less_than_the_read_that_they_save() -> None:
    """Of R columns: written and read in float32, where dgate would be read in 16 bits."""
    for arch in (*ARCHS, None):
        for drops in (False, True):
            config = gated_policy.pick_gated_backward(16, arch, drops=drops)
            assert config.BLOCK_L * config.PARTS * 2 >= 2 * 4 * 16


def test_walks_are_long_where_rows_are_many_and_there_are_programs_for_all_where_they_are_few() -> (
    None
):
    forward = gated_policy.pick_gated_forward(torch.bfloat16, 16)
    assert gated_policy.columns_each(forward, 64, 14336) == 1
    assert gated_policy.columns_each(forward, 8192, 14336) == 8
    config = gated_policy.pick_gated_backward(16, 90, drops=False)
    blocks = 14336 // (config.BLOCK_L * config.PARTS)
    assert gated_policy.rows_each(config, 64, blocks) == 64
    rows = gated_policy.rows_each(config, 8192, blocks)
    assert rows % config.BLOCK_M == 0
    multiprocessors = launch_policy.TABLE[(90,)].multiprocessors
    assert blocks * -(-8192 // rows) >= 2 * multiprocessors
