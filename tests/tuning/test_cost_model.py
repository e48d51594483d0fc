"""The choice without a clock, for every device, and the modelled times behind it."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")
from lora_fast.kernels import launch_policy
from tuner_queries import BF16, FP16, FP32, NF4, PLAIN, TRAINED

from lora_fast.factors import Needs
from lora_fast.tuning import cost_model, counts, product_speed
from lora_fast.tuning.plans import (
    AUGMENTED,
    BACKWARD_GROUP,
    FORWARD,
    FORWARD_GROUP,
    FUSED,
    HYBRID,
    candidates,
)
from lora_fast.tuning.product_speed import Row, tile_name

ARCHS = [None, 75, 80, 86, 89, 90, 100, 103, 120]
FROZEN_x = Needs()
GROUP = PLAIN._replace(
    op=BACKWARD_GROUP, N=(4096, 1024, 1024), R=(16,) * 3, weights=(BF16,) * 3, needs=(TRAINED,) * 3
)
NF4_GROUP = GROUP._replace(weights=NF4.weights * 3)
DENSE = [PLAIN, GROUP, PLAIN._replace(dtype=FP16, weights=(FP16,)), PLAIN._replace(R=(1024,))]


def _forward(q):
    op = FORWARD if len(q.N) == 1 else FORWARD_GROUP
    return q._replace(op=op, needs=(FROZEN_x,) * len(q.N))


@pytest.mark.parametrize("arch", ARCHS)
def test_cublas_multiplies_many_rows_until_a_device_was_measured(arch):
    for M in (2048, 8192):
        for q in DENSE:
            assert cost_model.pick(q._replace(M=M), arch) == HYBRID
            assert cost_model.pick(_forward(q)._replace(M=M), arch) == HYBRID
        for q in (NF4, NF4_GROUP):
            assert cost_model.pick(q._replace(M=M), arch) == HYBRID
            assert cost_model.pick(_forward(q)._replace(M=M), arch) == AUGMENTED


@pytest.mark.parametrize("arch", ARCHS)
def test_few_rows_are_one_launch(arch):
    for M, q in itertools.product((16, 64), (*DENSE, NF4, NF4_GROUP)):
        for asked in (q._replace(M=M), _forward(q)._replace(M=M)):
            assert cost_model.pick(asked, arch) == FUSED
            assert cost_model.shortlist(asked, arch) == (FUSED,)


@pytest.mark.parametrize("arch", ARCHS)
def test_without_cublas_the_kernels_do_all(arch):
    for M, q in itertools.product((16, 2048, 8192), (*DENSE, NF4)):
        asked = q._replace(M=M, cublas=False)
        picked, plans = cost_model.pick(asked, arch), cost_model.shortlist(asked, arch)
        assert picked == plans[0]
        assert {plan.route for plan in plans} == {"fused"}
        if arch != 90 or M != 8192:
            assert picked == FUSED


@pytest.mark.parametrize("q", [PLAIN, _forward(PLAIN), NF4, GROUP], ids=lambda q: q.summary)
def test_without_cublas_or_a_clock_hopper_takes_tiles_of_256_columns(q):
    """128 × 128 tiles want more of its shared memory than there is, so 16 % of a product's time, by
    the model; of a shape whose wide tiles fill the device less than twice, none is offered."""
    asked = q._replace(M=8192, cublas=False)
    picked = cost_model.pick(asked, 90)
    assert picked.gemm is not None and picked.gemm.BLOCK_N == 256
    assert cost_model.seconds(picked, asked, 90) < cost_model.seconds(FUSED, asked, 90)
    assert cost_model.pick(asked._replace(M=256), 90) == FUSED


def test_a_weight_that_is_not_decoded_or_has_no_low_rank_is_not_augmented():
    mixed = _forward(NF4_GROUP)._replace(weights=(BF16, *NF4.weights * 2))
    without = _forward(NF4)._replace(R=(0,), adapter=None)
    assert [cost_model.pick(q, 90) for q in (mixed, without)] == [HYBRID] * 2


@pytest.mark.parametrize("arch", ARCHS)
def test_few_plans_are_worth_timing_and_both_sides_are_among_them(arch):
    for M, q in itertools.product((2048, 8192), (*DENSE, NF4, NF4_GROUP)):
        for asked in (q._replace(M=M), _forward(q)._replace(M=M)):
            plans = cost_model.shortlist(asked, arch)
            assert plans[0] == cost_model.pick(asked, arch)
            assert 2 <= len(plans) == len(set(plans)) <= cost_model.MOST_TIMED
            assert {plan.route == "fused" for plan in plans} == {True, False}
            assert set(plans[1:]) <= set(candidates(asked, arch))


def test_hopper_times_tiles_of_256_columns():
    plans = cost_model.shortlist(PLAIN._replace(M=8192), 90)
    assert [plan.gemm and (plan.gemm.BLOCK_N, plan.gemm.num_stages) for plan in plans] == [
        None, (256, 4), (256, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
@pytest.mark.parametrize("M", [2048, 8192])
def test_no_default_can_be_slower_than_hybrid(arch, M):
    """At the lower end of what Triton may reach, too."""
    for q in (*DENSE, NF4, NF4_GROUP):
        for asked in (q._replace(M=M), _forward(q)._replace(M=M)):
            default = cost_model.seconds(cost_model.pick(asked, arch), asked, arch, e=0.85)
            assert default <= cost_model.seconds(HYBRID, asked, arch, e=0.85)


@pytest.fixture
def measured(monkeypatch):
    """Make a value of e the measured one of every tile on sm_90."""

    def measure(e: float) -> None:
        tiles = [launch_policy.pick_gemm(8192, BF16, 90)]
        tiles += launch_policy.other_gemms(8192, 4096, BF16, 90)
        rows = tuple(
            Row(direction, 8192, 4096, 4096, tile_name(tile), e)
            for direction in product_speed.DIRECTIONS
            for tile in tiles
        )
        monkeypatch.setattr(product_speed, "_measured", lambda: {"90": rows})

    return measure


def test_where_e_is_measured_the_model_chooses(measured):
    asked = PLAIN._replace(M=8192)
    measured(0.85)
    assert cost_model.pick(asked, 90) == HYBRID
    measured(1.0)
    assert cost_model.pick(asked, 90).route == "fused"
    assert cost_model.pick(asked, 90).gemm.BLOCK_N == 256
    assert cost_model.pick(asked, 100) == HYBRID
    # What is timed begins with it, and cuBLAS stays among it.
    plans = cost_model.shortlist(asked, 90)
    assert plans[0].route == "fused" and HYBRID in plans


@pytest.mark.parametrize("op", [FORWARD, "backward"])
@pytest.mark.parametrize("plan", [FUSED, HYBRID], ids=lambda plan: plan.name)
def test_more_work_never_takes_less_time(op, plan):
    # With rows enough that the host does not set the time.
    base = PLAIN._replace(op=op, M=8192)
    for field, values in (
        ("M", (4096, 8192, 16384)), ("K", (4096, 8192)), ("R", ((8,), (64,), (256,))),
    ):  # fmt: skip
        times = [cost_model.seconds(plan, base._replace(**{field: v}), 90) for v in values]
        assert all(a < b for a, b in itertools.pairwise(times))


def test_a_product_takes_its_share_of_the_peak():
    """8192 × 4096 × 4096 in bfloat16 at 798 TFLOP/s."""
    frozen = PLAIN._replace(op=FORWARD, M=8192, R=(0,), adapter=None)
    assert cost_model.seconds(HYBRID, frozen, 90) == pytest.approx(
        2 * 8192 * 4096 * 4096 / (989.4e12 * 0.807) + cost_model.LAUNCH_SECONDS
    )


def test_small_operations_take_the_host_s_time():
    small = PLAIN._replace(M=128, K=256, N=(256,), adapter=BF16)
    for plan in (FUSED, HYBRID):
        works = counts.works(plan, small, 90)
        assert cost_model.seconds(plan, small, 90) == cost_model.host_seconds(works)
    launches = [w.launches * (5e-6 if w.is_aten else 8e-6) for w in works]
    assert cost_model.host_seconds(works) == pytest.approx(sum(launches))


def test_float32_tiles_reach_half_of_cublas():
    asked = PLAIN._replace(op=FORWARD, M=8192, dtype=FP32, weights=(FP32,), adapter=FP32)
    fused, hybrid = (cost_model.seconds(plan, asked, 90) for plan in (FUSED, HYBRID))
    assert 1.7 < fused / hybrid < 2.0


def test_tf32_is_multiplied_by_tensor_cores():
    """At half of the rate of 16 bits, and our tiles at the same e."""
    asked = PLAIN._replace(op=FORWARD, M=8192, dtype=FP32, weights=(FP32,), adapter=FP32)
    ieee, tf32 = (cost_model.seconds(FUSED, asked._replace(tf32=on), 90) for on in (False, True))
    sixteen_bits = cost_model.seconds(FUSED, PLAIN._replace(op=FORWARD, M=8192), 90)
    assert sixteen_bits < tf32 < 0.5 * ieee


def test_torch_is_not_asked_about_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("asked about CUDA"))
    cost_model.pick(PLAIN, 90)
    cost_model.shortlist(PLAIN, 90)
