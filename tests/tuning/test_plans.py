"""Queries of the tuner, and their candidates."""

from __future__ import annotations

import pytest
import torch
from tuner_queries import BF16, FP16, FP32, NF4, PLAIN, TRAINED

pytest.importorskip("triton")
from lora_fast.kernels import launch_policy

from lora_fast import NF4Weight
from lora_fast.factors import Constants, Factors, Needs
from lora_fast.four_bit.decoded import Decoded
from lora_fast.tuning.plans import (
    AUGMENTED,
    BACKWARD,
    BACKWARD_GROUP,
    FORWARD,
    FUSED,
    HYBRID,
    MANY_ROWS,
    bucket,
    candidates,
    query,
)


def test_rows_fall_into_few_buckets():
    assert [bucket(M) for M in (1, 16, 17, 64, 65, 2048, 2049, 10**6)] == [
        16, 16, 64, 64, 2048, 2048, MANY_ROWS, MANY_ROWS,
    ]  # fmt: skip


def test_every_field_is_in_the_key():
    others = [
        PLAIN._replace(op=FORWARD),
        PLAIN._replace(op=BACKWARD_GROUP),
        PLAIN._replace(M=8192),
        PLAIN._replace(K=4080),
        PLAIN._replace(N=(4080,)),
        PLAIN._replace(R=(32,)),
        PLAIN._replace(dtype=FP16),
        PLAIN._replace(adapter=BF16),
        PLAIN._replace(adapter=None),
        PLAIN._replace(weights=(FP32,)),
        NF4,
        PLAIN._replace(weights=((128, True),)),
        PLAIN._replace(weights=((64, False),)),
        *(PLAIN._replace(switches=tuple(i == j for j in range(6))) for i in range(6)),
        *(PLAIN._replace(needs=(TRAINED._replace(**{name: True}),)) for name in ("bias", "g")),
        PLAIN._replace(cublas=False),
        PLAIN._replace(dtype=FP32),
        PLAIN._replace(dtype=FP32, tf32=True),
    ]
    assert len({q.key for q in (PLAIN, *others)}) == len(others) + 1


def test_the_terminal_is_told_which_rows_a_timing_stands_for():
    said = "the backward of 4096 → 4096, {} rows, bfloat16"
    assert PLAIN.summary == said.format("up to 2048")
    assert PLAIN._replace(M=MANY_ROWS).summary == said.format("more than 2048")


def test_a_query_describes_the_operands():
    x = torch.zeros(100, 72, dtype=BF16)
    weight = NF4Weight.from_dense(torch.randn(88, 72, dtype=BF16))
    A, B, g = torch.zeros(8, 72), torch.zeros(88, 8), torch.ones(88)
    f = Factors(weight, A=A, B=B, g=g, constants=Constants(dropout_p=0.1))
    asked = query(FORWARD, x, [f], [Needs()], cublas=True)
    assert (asked.M, asked.K, asked.N, asked.R) == (2048, 72, (88,), (8,))
    assert (asked.dtype, asked.adapter, asked.weights) == (BF16, FP32, ((64, True),))
    assert [name for name in ("bias", "b", "d", "g", "dropout", "spans") if asked.has(name)] == [
        "g",
        "dropout",
    ]
    frozen = query(FORWARD, x, [Factors(x)], [Needs()], cublas=False)
    assert (frozen.R, frozen.adapter, frozen.weights) == ((0,), None, (BF16,))


@pytest.fixture
def restored_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("restored_precision")
def test_whether_tf32_multiplies_is_part_of_a_query_in_float32():
    """A plan that was timed with TF32 says nothing about IEEE products, and the reverse."""

    def asked(dtype=FP32):
        x = torch.zeros(100, 72, dtype=dtype)
        return query(FORWARD, x, [Factors(x)], [Needs()], cublas=True)

    matmul = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")
    ieee = asked()
    settings = [
        lambda: setattr(matmul, "allow_tf32", True),
        lambda: torch.set_float32_matmul_precision("high"),
    ]
    if hasattr(matmul, "fp32_precision"):
        settings.append(lambda: setattr(matmul, "fp32_precision", "tf32"))
    for allow in settings:
        torch.set_float32_matmul_precision("highest")
        assert asked() == ieee
        allow()
        assert asked() == ieee._replace(tf32=True) and asked().key != ieee.key
        assert not asked(BF16).tf32


def test_a_weight_that_was_left_decoded_is_a_dense_one():
    """A recomputed forward pass leaves it to backward, which does not decode it."""
    x = torch.zeros(100, 72, dtype=BF16)
    weight = NF4Weight.from_dense(torch.randn(88, 72, dtype=BF16))
    weight.decoded = Decoded()
    for W, kind in ((None, (64, True)), (torch.zeros(88, 72, dtype=BF16), BF16)):
        weight.decoded.dense = W
        asked = query(BACKWARD, x, [Factors(weight)], [Needs(x=True)], cublas=True)
        assert asked.weights == (kind,)


def test_a_dense_layer_has_tiles_and_cublas():
    for asked in (PLAIN, PLAIN._replace(M=8192)):
        plans = candidates(asked, 90)
        assert plans[0] == FUSED
        assert plans[-1] == HYBRID
        others = launch_policy.other_gemms(asked.M, 4096, BF16, 90)
        assert [plan.gemm for plan in plans[1:-1]] == list(others)
        assert len(others) >= 2


def test_without_cublas_there_are_kernels_alone():
    routes = {plan.route for plan in candidates(NF4._replace(op=FORWARD, cublas=False), 90)}
    assert routes == {"fused"}


def test_an_nf4_layer_is_decoded_first_or_not_the_modelled_choice_first():
    for M, workspace in ((64, False), (8192, True)):
        plans = candidates(NF4._replace(M=M), 90)
        routes = [plan.workspace for plan in plans if not plan.gemm]
        assert routes == [workspace, not workspace, None]
    for asked in (NF4._replace(K=71), NF4._replace(needs=(TRAINED._replace(x=False),))):
        assert [plan for plan in candidates(asked, 90) if not plan.gemm] == [FUSED, HYBRID]


def test_a_forward_pass_over_nf4_weights_may_be_augmented():
    forward = NF4._replace(op=FORWARD, needs=(Needs(),))
    assert candidates(forward, 90)[-2:] == (HYBRID, AUGMENTED)
    mixed = forward._replace(N=(4096, 1024), R=(16, 16), weights=(BF16, (64, True)))
    for asked in (
        NF4,
        mixed,
        forward._replace(R=(0,), adapter=None),
        forward._replace(cublas=False),
    ):
        assert AUGMENTED not in candidates(asked, 90)


def test_few_rows_and_float32_have_one_tile():
    for asked in (PLAIN._replace(M=64), PLAIN._replace(dtype=FP32)):
        assert candidates(asked, 90) == (FUSED, HYBRID)


def test_gains_and_dropout_have_wide_tiles_where_there_are_many():
    gain = PLAIN._replace(M=8192, switches=(False, False, False, True, False, False))
    masked = PLAIN._replace(M=8192, switches=(False,) * 4 + (True, False))
    for asked in (gain, masked):
        assert {plan.gemm.BLOCK_N for plan in candidates(asked, 90)[1:-1]} == {256}
        assert candidates(asked._replace(M=2048), 90) == (FUSED, HYBRID)
    parts = {plan.gemm.MASK_PARTS for plan in candidates(masked, 90)[1:-1]}
    assert parts == {4}


def test_a_group_has_the_candidates_of_a_layer():
    group = PLAIN._replace(op=BACKWARD_GROUP, N=(4096, 1024), R=(16, 16), needs=(TRAINED,) * 2)
    assert candidates(group, 90) == candidates(PLAIN, 90)
    mixed = group._replace(weights=(BF16, (64, True)))
    assert candidates(mixed, 90) == candidates(NF4, 90)


@pytest.mark.parametrize("arch", [None, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("asked", [PLAIN, NF4], ids=["dense", "nf4"])
def test_names_tell_the_candidates_apart(asked, arch):
    for M in (2048, 8192):
        plans = candidates(asked._replace(M=M), arch)
        assert len({plan.name for plan in plans}) == len(plans) == len(set(plans))
