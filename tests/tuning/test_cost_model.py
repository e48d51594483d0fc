"""The cost model's choices, for every device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import itertools

from tuner_queries import BF16, FP16, FP32, NF4, PLAIN, TRAINED

from lora_fast.tuning import cost_model
from lora_fast.tuning.plans import BACKWARD_GROUP, FORWARD, FORWARD_GROUP, FUSED, HYBRID

ARCHS = [None, 75, 80, 86, 89, 90, 100, 103, 120]
GROUP = PLAIN._replace(N=(4096, 1024, 1024), R=(16,) * 3, weights=(BF16,) * 3, needs=(TRAINED,) * 3)


def _forward(q):
    return q._replace(op=FORWARD, needs=q.needs[:1])


@pytest.mark.parametrize("arch", ARCHS)
def test_small_ranks_run_fused_with_16_bit_operands(arch):
    for M in (16, 64, 512, 8192):
        for base in (PLAIN, NF4, PLAIN._replace(dtype=FP16, weights=(FP16,))):
            for asked in (base._replace(M=M), _forward(base)._replace(M=M)):
                assert cost_model.pick(asked, arch) == FUSED
        for op in (FORWARD_GROUP, BACKWARD_GROUP):
            assert cost_model.pick(GROUP._replace(op=op, M=M), arch) == FUSED


@pytest.mark.parametrize("arch", ARCHS)
def test_ieee_products_of_many_rows_are_left_to_cublas(arch):
    asked = PLAIN._replace(M=8192, dtype=FP32, weights=(FP32,))
    assert cost_model.pick(asked, arch) == HYBRID
    assert cost_model.pick(_forward(asked), arch) == HYBRID


def test_a_wide_rank_makes_strips_read_dY_again_and_again():
    """At rank 1024 they walk over dY and x sixteen times; two products of cuBLAS read them once."""
    asked = PLAIN._replace(M=8192, R=(1024,))
    assert cost_model.pick(asked, 90) == HYBRID
    assert cost_model.pick(asked._replace(cublas=False), 90) == FUSED
    dropout = asked._replace(R=(16,), switches=(False,) * 4 + (True, False))
    assert cost_model.pick(dropout, 90) == FUSED


@pytest.mark.parametrize("op", [FORWARD, "backward"])
def test_more_work_never_takes_less_time(op):
    def times(**changes):
        asked = PLAIN._replace(op=op, **changes)
        return [cost_model.seconds(plan, asked, 90) for plan in (FUSED, HYBRID)]

    for field, values in (
        ("M", (64, 512, 8192)),
        ("K", (1024, 4096)),
        ("R", ((8,), (64,), (256,))),
    ):
        rows = [times(**{field: value}) for value in values]
        assert all(
            a < b for column in zip(*rows, strict=True) for a, b in itertools.pairwise(column)
        )


def test_every_device_has_a_roofline():
    names = [cost_model.roofline_of(arch).name for arch in ARCHS]
    assert names == [
        "H100", "A100", "A100", "RTX 4090", "RTX 4090", "H100", "B200", "B200", "RTX 4090",
    ]  # fmt: skip


def test_a_product_takes_its_share_of_the_peak():
    """8192 × 4096 × 4096 in bfloat16 at 653 TFLOP/s, and one read of a weight at 2.8 TB/s."""
    frozen = PLAIN._replace(op=FORWARD, M=8192, R=(0,), adapter=None)
    assert cost_model.seconds(HYBRID, frozen, 90) == pytest.approx(
        2 * 8192 * 4096 * 4096 / (989.4e12 * 0.66) + 2e-6
    )
    few = frozen._replace(M=16)
    moved = 2 * (4096 * 4096 + 2 * 16 * 4096)
    assert cost_model.seconds(FUSED, few, 90) == pytest.approx(moved / (3.35e12 * 0.84) + 2e-6)


def test_torch_is_not_asked_about_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("asked about CUDA"))
    cost_model.pick(PLAIN, 90)
