"""The gate of experts, every shipped configuration, compiled for absent GPUs: what they take of
a device, the products that they use, and that these are fenced and not serialised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from lora_fast.kernels import (
    expert_gate_backward,
    expert_gate_forward,
    expert_gate_gradients,
    gated_policy,
)
from lora_fast.kernels.expert_gate_tiles import ExpertMember, Glu
from lora_fast.kernels.triton_version import VERSION
from offline_launches import assert_walk_fits

from bench.instruments import stub_driver

ARCHS = [80, 89, 90, 100, 120]
# Bytes of local memory that no loop touches, as of the kernels of a gated MLP.
AWAY_FROM_LOOPS = 32 if VERSION >= (3, 7) else 48
SILU = Glu()
GPT_OSS = Glu("silu", interleaved=True, limit=7.0, alpha=1.702, shift=1.0)


@dataclass(frozen=True)
class Case:
    """The experts of Qwen3-30B-A3B; more rows make no other kernel."""

    R: int = 16
    glu: Glu = SILU
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.float32


PLAIN = Case()
CLAMPED = replace(PLAIN, glu=GPT_OSS, bias=True)
CASES = {
    "plain": PLAIN,
    "clamped": CLAMPED,
    "clamped-r32": replace(CLAMPED, R=32),
    "clamped-r64": replace(CLAMPED, R=64),
    "r64": replace(PLAIN, R=64),
    "r8": replace(PLAIN, R=8),
    "float16-r8": replace(PLAIN, R=8, dtype=torch.float16),
    "float16-r100": replace(PLAIN, R=100, dtype=torch.float16, bias=True),
    "float32": replace(CLAMPED, dtype=torch.float32),
    "gelu": replace(PLAIN, glu=Glu("gelu"), bias=True),
    "limited": replace(PLAIN, glu=Glu("silu", limit=7.0), adapter=torch.bfloat16),
    "gelu_tanh-interleaved": replace(PLAIN, glu=Glu("gelu_tanh", interleaved=True)),
}


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of(arch: int, case: Case) -> stub_driver.Log:
    """Both directions of the gate."""
    E, P, I, R, dtype = 128, 65536, 768, case.R, case.dtype  # noqa: E741
    base, v, S = (_meta(P, columns, dtype=dtype) for columns in (2 * I, I, R))
    A, B = (_meta(E, *shape, dtype=case.adapter) for shape in ((R, I), (2 * I, R)))
    bias = _meta(E, 2 * I, dtype=dtype) if case.bias else None
    offsets, order = _meta(E, dtype=torch.int32), _meta(P, dtype=torch.int64)
    w = _meta(P, dtype=torch.float32)
    member = ExpertMember(base, S, B, bias, 2.0)
    with stub_driver.recording(arch) as log:
        expert_gate_forward.activate(member, offsets, case.glu, A)
        if gated_policy.fits_experts(dtype, [R, R], arch, plain=case.glu.is_plain):
            wanted = expert_gate_backward.Wanted(True, True, True, True)
            expert_gate_backward.gradients(
                member, v, w, order, offsets, case.glu, S, A, wanted=wanted, out=base
            )
        else:
            dS = S.to(torch.float32) if dtype == torch.float16 else S
            expert_gate_gradients.gradients(
                member, v, w, order, offsets, case.glu, dS, A, out=base, stores_h=True, needs_w=True
            )
    return log


SAMPLE = [(90, "plain"), (120, "clamped"), (80, "clamped-r64")]
MATRIX = [
    pytest.param(
        arch,
        case,
        id=f"sm_{arch}-{name}",
        marks=[] if (arch, name) in SAMPLE else pytest.mark.exhaustive,
    )
    for arch in ARCHS
    for name, case in CASES.items()
]


@pytest.mark.offline
@pytest.mark.parametrize(("arch", "case"), MATRIX)
def test_the_gate_fits_the_device(arch: int, case: Case) -> None:
    for launch in launches_of(arch, case).launches:
        multiplies = case.dtype != torch.float32
        assert_walk_fits(launch, arch, away_from_loops=AWAY_FROM_LOOPS, multiplies=multiplies)
        ptx = launch.kernel.text("ptx")
        # Full vectors; rows of S of other ranks do not start at 16 bytes, and biases are read
        # once for a tile.
        assert case.R % (8 if VERSION >= (3, 7) else 16) or case.bias or "global.b16" not in ptx, (
            launch.name
        )


@pytest.mark.offline
def test_the_cases_use_every_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    picked = set()
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: picked.add(_key(kwargs)))
    for arch in ARCHS:
        for case in CASES.values():
            launches_of(arch, case)
    own = {(c.BLOCK_M, c.BLOCK_L, getattr(c, "PARTS", None)) for c in gated_policy.OF_EXPERTS}
    gated = {(c.BLOCK_M, c.BLOCK_L, getattr(c, "PARTS", None)) for c in gated_policy.OF_GATED}
    assert own <= picked <= own | gated


def _key(options: dict[str, Any]) -> tuple[int, int, int | None]:
    tiles = options["TILES"]
    return tiles.BLOCK_M, tiles.BLOCK_L, options.get("PARTS")


@pytest.mark.offline
def test_partials_are_summed_over_many_columns() -> None:
    """Of S2: at least 128 columns of h, unless there are fewer; of dS1: as many of du."""
    for dtype in (torch.bfloat16, torch.float32):
        config = gated_policy.pick_expert_forward(dtype, 16, plain=True)
        for row_tiles in (1, 10_000):
            assert gated_policy.tiles_each(config, row_tiles, 768) * config.BLOCK_L >= 128
        assert gated_policy.tiles_each(config, 1, 1) == 1
    for arch in (*ARCHS, None):
        for plain in (True, False):
            found = gated_policy.pick_expert_backward(16, arch, plain=plain)
            assert 2 * found.BLOCK_L * found.PARTS >= 128
