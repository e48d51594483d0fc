"""Each route computes each pass, in all combinations of the tuner: fused, hybrid and augmented."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from equation import Case, check, eager, exact, fused, make
from group_checks import check as check_group

from bench.instruments.accuracy import assert_all_accurate, assert_same_bits

pytest.importorskip("triton")
from lora_fast.kernels import nf4_tile
from lora_fast.kernels.launch_policy import GemmConfig

import lora_fast
from bench.instruments import stub_driver
from lora_fast import NF4Weight
from lora_fast.backends import selection, triton_ops
from lora_fast.backends.triton_ops import TritonBackend
from lora_fast.factors import Factors, Needs, Saved
from lora_fast.tuning.plans import AUGMENTED, BACKWARD, FORWARD, FUSED, HYBRID, Plan
from lora_fast.tuning.timing import Measured
from lora_fast.tuning.tuner import Tuner

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ALL = ("x", "bias", "A", "B", "b", "d", "g")
PLAIN = Case(M=70, K=72, N=136, dtype=BF16, adapter_dtype=FP32, R=8)
CASES = [
    PLAIN,
    replace(PLAIN, factors=ALL, p=0.3125, dtype=FP32, adapter_dtype=None),
    replace(PLAIN, nf4=True, p=0.3, adapter_dtype=None, dtype=FP16),
    replace(PLAIN, nf4=True, factors=ALL, R=100),
    replace(PLAIN, R=13, spans=((0, 5), (5, 13)), dtype=FP32, adapter_dtype=None),
    replace(PLAIN, trains=("A",), p=0.3),
    replace(PLAIN, factors=("x", "bias")),
    replace(PLAIN, factors=("x", "bias", "g"), dtype=FP16, adapter_dtype=None),
    replace(PLAIN, adapter_dtype=None, R=16, nf4=True, x_layout="transposed", dY_layout="sliced"),
    replace(PLAIN, factors=("x", "bias", "A", "B", "g"), M=160, N=40, nf4=True, p=0.1),
    replace(PLAIN, K=75, R=13, spans=((0, 5), (5, 13)), p=0.1, nf4=True),
]
# What one route saves for the other: S, V, the seed of a mask.
MIXED = CASES[1:3]
SMALL = GemmConfig(32, 32, 32, 32, 8, num_warps=4, num_stages=2)
WAYS = [(HYBRID, HYBRID), (FUSED, HYBRID), (HYBRID, FUSED)]
AUGMENTS = [(AUGMENTED, HYBRID), (AUGMENTED, FUSED)]


@pytest.fixture
def choosing(monkeypatch):
    """Make the tuner choose `forward` and `backward`; returns what it was asked."""

    def choose(forward: Plan, backward: Plan) -> list[str]:
        asked: list[str] = []

        def plan(query, device, run):
            asked.append(query.op)
            return forward if query.is_forward else backward

        monkeypatch.setattr(triton_ops.tuner, "times", True)
        monkeypatch.setattr(triton_ops.tuner, "plan", plan)
        return asked

    return choose


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("case", "ways"),
    [(case, WAYS[0]) for case in CASES]
    + [(case, ways) for case in MIXED for ways in WAYS[1:]]
    + [(case, AUGMENTS[0]) for case in CASES if case.nf4]
    + [(case, AUGMENTS[1]) for case in MIXED if case.nf4],
    ids=lambda value: str(value) if isinstance(value, Case) else "-".join(p.name for p in value),
)
def test_either_route_takes_either_pass(choosing, case, ways):
    asked = choosing(*ways)
    with lora_fast.set_backend("triton"):
        check(case)
    assert asked == [FORWARD, BACKWARD]


# What is executed for every architecture: wide loads and pipelines, and ragged edges.
COMPILED = [
    (replace(PLAIN, M=160, K=128, N=256, R=16, p=0.3, factors=("x", "bias", "A", "B")), HYBRID),
    (replace(PLAIN, factors=ALL, R=80, dtype=FP16, adapter_dtype=None, p=0.3), HYBRID),
    (replace(PLAIN, M=35, dtype=FP32, adapter_dtype=None, p=0.3125), HYBRID),
    (replace(PLAIN, M=160, K=128, N=256, R=16, p=0.3, nf4=True), AUGMENTED),
    (replace(PLAIN, factors=ALL, nf4=True), AUGMENTED),
]


@pytest.mark.parametrize(("case", "forward"), COMPILED, ids=str)
def test_routes_agree_with_the_reference(executor, choosing, case, forward):
    asked = choosing(forward, HYBRID)
    check(case, executor.device)
    assert asked == [FORWARD, BACKWARD]


SMALLEST = Case(M=37, K=40, N=44, R=5)
# By method, with a rank of its own: factors, the dtype of adapters if not that of x, spans.
METHODS = {
    "LoRA": {},
    "float32 adapters": {"adapter_dtype": FP32, "R": 16},
    "VeRA": {"factors": ("x", "A", "B", "b", "d"), "trains": ("x", "b", "d"), "R": 24},
    "wide VeRA": {"factors": ALL[:-1], "trains": ("x", "b", "d"), "R": 72, "adapter_dtype": FP32},
    "DoRA": {"factors": ("x", "bias", "A", "B", "g")},
    "all factors": {"factors": ALL, "R": 20},
    "IA3": {"factors": ("x", "bias", "g")},
    "frozen": {"factors": ("x", "bias")},
    "mixed batch": {"M": 36, "R": 13, "spans": ((0, 5), (5, 13), (0, 0))},
}


def check_every_method(choosing, dtype, nf4, p, device, ways=None):
    for way in ways or [WAYS[0], *AUGMENTS[:nf4]]:
        choosing(*way)
        for fields in METHODS.values():
            check(replace(SMALLEST, dtype=dtype, nf4=nf4, p=p, **fields), device)
        # The p of a group, 0.3, is drawn in steps of 2⁻¹⁵ as well, which float32 shows.
        for adapter in {dtype, FP32} if dtype != FP32 or not p else ():
            check_group(dtype, adapter, nf4, device=device, drops=p > 0)


# Dropout draws p in steps of 2⁻¹⁵. In float32 the difference shows, so it gets such a p.
DROPS = {BF16: 0.1, FP16: 0.1, FP32: 0.09375}


# Interpreted, every dtype has dropout on one kind of weight, and none on the other.
INTERPRETED = [
    *((BF16, True, True), (FP16, False, True), (FP32, True, True)),
    *((BF16, False, False), (FP16, True, False), (FP32, False, False)),
]


@pytest.mark.parametrize(("dtype", "nf4", "drops"), INTERPRETED, ids=str)
@pytest.mark.interpreter
def test_every_method_on_every_route(choosing, dtype, nf4, drops):
    with lora_fast.set_backend("triton"):
        check_every_method(choosing, dtype, nf4, DROPS[dtype] * drops, "cpu")


SCHEDULES = {"": {}, "one CTA, in reverse": {"schedule": "reverse", "resident": 1}}


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", SCHEDULES.values(), ids=list(SCHEDULES))
@pytest.mark.parametrize("drops", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("dtype", DROPS, ids=str)
def test_every_method_on_every_route_compiled(ptx_executor, choosing, dtype, nf4, drops, options):
    ways = [(FUSED, FUSED), WAYS[0], *AUGMENTS[:nf4]]
    with ptx_executor.with_options(**options):
        check_every_method(choosing, dtype, nf4, DROPS[dtype] * drops, ptx_executor.device, ways)


@pytest.mark.parametrize("forward", [HYBRID, AUGMENTED], ids=lambda plan: plan.name)
def test_every_schedule_gives_the_same_bits(ptx_executor, choosing, forward):
    choosing(forward, HYBRID)
    operands = make(replace(PLAIN, M=130, R=16, nf4=True, p=0.3))
    expected = fused(operands)
    with ptx_executor.with_options(schedule="reverse", resident=1):
        results = fused(operands)
    for name, value in expected.items():
        if value is not None:
            assert_same_bits(results[name], value, name=name)


NF4_ROUTES = [Plan(workspace=True), Plan(workspace=False)]


@pytest.mark.interpreter
@pytest.mark.parametrize("plan", NF4_ROUTES, ids=lambda plan: plan.name)
def test_both_nf4_routes_have_the_same_bits(choosing, plan):
    def results():
        alone = check(replace(PLAIN, nf4=True))
        return {**alone, **check_group(BF16, FP32, True)}

    with lora_fast.set_backend("triton"):
        expected = results()
        choosing(plan, plan)
        for name, value in results().items():
            if value is not None:
                assert_same_bits(value, expected[name], name=name)


class Seen(Exception):
    pass


@pytest.mark.interpreter
@pytest.mark.parametrize("plan", [*NF4_ROUTES, Plan(gemm=SMALL, workspace=True)], ids=str)
def test_a_plan_reaches_every_launch(monkeypatch, choosing, plan):
    """The configuration of each GEMM, and whether an NF4 weight is decoded before."""
    seen = []

    def gemm(*args, config, **kwargs):
        seen.append((config, isinstance(args[1], nf4_tile.Nf4Operand)))
        raise Seen

    def grad_input(layers, dropout, *, config, **kwargs):
        seen.extend((config, isinstance(layer[1], nf4_tile.Nf4Operand)) for layer in layers)
        raise Seen

    weight = NF4Weight.from_dense(torch.randn(8, 64))
    f = Factors(weight, A=torch.zeros(2, 64), B=torch.zeros(8, 2))
    x, dY, S, needs = torch.zeros(4, 64), torch.zeros(4, 8), torch.zeros(4, 2), Needs(x=True)
    choosing(plan, plan)
    monkeypatch.setattr(triton_ops.ticketed_gemm, "forward", gemm)
    monkeypatch.setattr(triton_ops.ticketed_gemm, "grad_input", grad_input)
    ops, two = TritonBackend(cublas=False), torch.cat([S, S], dim=1)
    for call in (
        lambda: ops.forward(x, [f], [needs]),
        lambda: ops.backward([dY], x, Saved(S), [f], [needs]),
        lambda: ops.forward(x, [f, f], [needs] * 2),
        lambda: ops.backward([dY, dY], x, Saved(two), [f, f], [needs] * 2),
    ):
        with pytest.raises(Seen):
            call()
    assert seen == [(plan.gemm, not plan.workspace)] * 5


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "ways", WAYS + AUGMENTS, ids=lambda ways: "-".join(plan.name for plan in ways)
)
@pytest.mark.parametrize(("dtype", "nf4", "drops"), [(BF16, False, True), (FP16, True, False)])
def test_a_group_mixes_routes_as_well(choosing, dtype, nf4, drops, ways):
    asked = choosing(*ways)
    with lora_fast.set_backend("triton"):
        check_group(dtype, FP32, nf4, drops=drops)
    assert asked == ["forward_group", "backward_group"]


@pytest.mark.interpreter
def test_the_second_call_has_the_bits_of_the_first(monkeypatch, tmp_path):
    """Every candidate runs before the first result is returned."""
    monkeypatch.setenv("LORA_FAST_CACHE_DIR", str(tmp_path))
    timed = []

    def timer(call, left):
        call()
        timed.append(call)
        return Measured(float(-len(timed)), 0.0)

    monkeypatch.setattr(triton_ops, "tuner", Tuner(times=True, timer=timer))
    monkeypatch.setattr(selection, "_triton", lambda name: TritonBackend(cublas=True))
    with lora_fast.set_backend("triton"):
        operands = make(replace(PLAIN, nf4=True))
        first = fused(operands)
        ran = len(timed)
        second = fused(operands)
    assert ran >= 6
    assert len(timed) == ran
    assert_all_accurate(first, exact(operands), eager(operands), compute_dtype=BF16, name="tuned")
    for name, value in first.items():
        if value is not None:
            assert_same_bits(second[name], value, name=name)


@pytest.mark.offline
def test_auto_leaves_ieee_products_to_cublas(monkeypatch):
    """float32 in both passes: what is launched are the gradients of factors, and the sum of dS."""
    monkeypatch.setattr(triton_ops, "tuner", Tuner(times=False))
    x, dY, W, A, B = (
        torch.empty(shape, device="meta")
        for shape in ((512, 768), (512, 768), (768, 768), (8, 768), (768, 8))
    )
    f, needs, ops = Factors(W, A=A, B=B), Needs(x=True, A=True, B=True), TritonBackend(cublas=True)
    with stub_driver.recording(90) as log:
        _, saved = ops.forward(x, [f], [needs])
        ops.backward([dY], x, saved, [f], [needs])
    assert log.names == ["strips", "ticketed_gemm", "strips"]
    assert "y_ptr" not in log.launches[1].arguments


class Launched(Exception):
    pass


@pytest.fixture
def no_launch(monkeypatch):
    def launch(*args, config, **kwargs):
        assert config is FUSED.gemm
        raise Launched

    monkeypatch.setattr(triton_ops.ticketed_gemm, "forward", launch)


def test_the_tuner_knows_whether_cublas_may_multiply(monkeypatch, no_launch):
    """ "auto" leaves products to cuBLAS, "triton" does not."""
    asked = []

    def plan(query, device, run):
        asked.append(query.cublas)
        return FUSED

    monkeypatch.setattr(triton_ops.tuner, "plan", plan)
    x, f = torch.zeros(4, 8), Factors(torch.zeros(8, 8))
    for cublas in (True, False):
        with pytest.raises(Launched):
            TritonBackend(cublas=cublas).forward(x, [f], [Needs()])
    assert asked == [True, False]


def test_an_empty_batch_needs_no_choice(monkeypatch, no_launch):
    monkeypatch.setattr(triton_ops.tuner, "plan", lambda *args: pytest.fail("asked"))
    f = Factors(torch.zeros(8, 8))
    with pytest.raises(Launched):
        TritonBackend(cublas=True).forward(torch.zeros(0, 8), [f], [Needs()])
