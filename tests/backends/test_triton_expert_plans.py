"""Blocks of experts repeat the launches of earlier calls, whatever rows their experts have now."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from checked_plans import bound_launches
from expert_checks import GATES, E, fused, operands, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
import lora_fast
from bench.instruments import stub_driver
from bench.instruments.accuracy import assert_same_bits
from lora_fast.backends import triton_expert_plans, triton_expert_products, triton_plans
from lora_fast.experts.nf4_experts import NF4Experts
from lora_fast.four_bit import decoded
from lora_fast.functional import adapted_experts, adapted_linear
from lora_fast.nf4 import NF4Weight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES: dict[str, Any] = {"tokens": 12, "k": 2, "r": 16, "hidden": 32, "inner": 16}


def packed(factors: dict[str, Any], transposed: bool) -> dict[str, Any]:
    stored = factors["weight"].mT.contiguous() if transposed else factors["weight"]
    matrix = NF4Weight.from_dense(stored.reshape(-1, stored.shape[2]))
    matrix.quant_state.shape = stored.shape
    return {**factors, "weight": NF4Experts(matrix.packed, matrix.quant_state, transposed)}


def values_of(seed: int = 0, nf4: bool | None = None, **changes: Any) -> Any:
    """Operands whose values, routing among them, are those of a seed; nf4: transposed or not."""
    given = {**SIZES, "transposed": False, "bias": True, **changes}
    x, index, w, *both = operands(2 * given["inner"], **given)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, E + seed % 2, index.shape, generator=generator)
    for factors in both:
        for name in ("A", "B"):
            factors[name] = factors[name] * torch.rand(1, generator=generator)
    x = x + torch.randn(x.shape, generator=generator)
    if nf4 is not None:
        both = [packed(factors, nf4) for factors in both]
    return [x, index, w, *both]


def project(x: Tensor, index: Tensor, w: Tensor, first: Any, second: Any) -> Tensor:
    """The first projection alone, of the tokens as if they were sorted."""
    offsets = torch.bincount(index[:, 0].clamp(max=E - 1), minlength=E).cumsum(0)
    return adapted_experts(x, first.pop("weight"), offsets, first.pop("bias"), **first)


def checkpointed(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Recomputed, with the weights left decoded for backward."""
    return functools.partial(checkpoint, call, use_reentrant=False)


# By what differs in the launches: (call, dtype, operands).
CASES: dict[str, tuple[Callable[..., Tensor], torch.dtype, dict[str, Any]]] = {
    "strips": (fused("silu"), BF16, {}),
    "tiles": (fused("silu"), FP32, {}),
    "float16": (fused("silu"), FP16, {}),
    "clamped": (fused("clamped"), BF16, {"bias": False}),
    "interleaved, rank 3": (fused("interleaved"), BF16, {"r": 3}),
    "transposed": (fused("silu"), BF16, {"transposed": True, "bias": False}),
    "nf4": (fused("silu"), BF16, {"nf4": False, "inner": 32}),
    "nf4, transposed": (fused("silu"), FP32, {"nf4": True, "inner": 32}),
    "nf4, transposed, strips": (fused("silu"), BF16, {"nf4": True, "inner": 32}),
    "nf4, checkpointed": (checkpointed(fused("silu")), BF16, {"nf4": False, "inner": 32}),
    "nf4, transposed, checkpointed": (
        checkpointed(fused("silu")),
        BF16,
        {"nf4": True, "inner": 32},
    ),
    "own": (fused("own"), FP32, {}),
    "own, float16": (fused("own"), FP16, {"bias": False}),
    "own, nf4, transposed": (fused("own"), BF16, {"nf4": True, "inner": 32}),
    "own, nf4, checkpointed": (checkpointed(fused("own")), BF16, {"nf4": False, "inner": 32}),
    "one projection": (project, BF16, {}),
    "one projection, nf4": (project, BF16, {"nf4": False, "inner": 32}),
    "one projection, nf4, transposed": (project, BF16, {"nf4": True, "inner": 32}),
}
each_case = pytest.mark.parametrize("case", CASES)


def trained(case: str) -> tuple[str, ...]:
    names = ("x", "w", "first.bias", "first.A", "first.B", "second.bias", "second.A", "second.B")
    biased = CASES[case][2].get("bias", True)
    return tuple(name for name in names if biased or not name.endswith("bias"))


def results(case: str, seed: int) -> dict[str, Any]:
    call, dtype, changes = CASES[case]
    return run(call, values_of(seed, **changes), dtype, trained(case))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(decoded.bytes_saved, "told", 1 << 30)
    with stub_driver.recording(90) as log, lora_fast.set_backend("triton"):
        yield log.launches


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch, launches: Any) -> list[str]:
    """The kernels whose launches went through Triton's binder."""
    return bound_launches(monkeypatch)


@pytest.mark.offline
@each_case
def test_the_third_call_launches_the_same_without_the_binder(
    launches: Any, bound: list[str], case: str
) -> None:
    for seed in range(2):
        results(case, seed)
    each = len(launches) // 2
    assert len(bound) == 2 * each > 0
    results(case, 2)
    assert len(bound) == 2 * each and len(launches) == 3 * each
    for one, other in zip(launches[:each], launches[2 * each :], strict=True):
        assert (one.name, one.grid, one.constexprs) == (other.name, other.grid, other.constexprs)
        assert one.kernel is other.kernel


@pytest.mark.offline
@pytest.mark.parametrize("product", ["one by one", "kernel"])
@each_case
def test_repeated_launches_are_those_that_triton_would_choose(
    launches: Any, case: str, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each launch of a plan is compared with the binder's (checked_plans.py)."""
    if product == "kernel":
        monkeypatch.setattr(triton_expert_products, "base_product_of", lambda rows, W: None)
    for seed in range(4):
        results(case, seed)
    assert len({launch.name for launch in launches}) > 1
    each = len(launches) // 4
    assert [n.name for n in launches[:each]] == [n.name for n in launches[-each:]]


OTHERS: dict[str, dict[str, Any]] = {
    "tokens": {"tokens": 11},
    "top-k": {"k": 3},
    "rank": {"r": 8},
    "width": {"hidden": 48},
    "stored transposed": {"transposed": True},
    "without bias": {"bias": False},
}


@pytest.mark.offline
@pytest.mark.parametrize("change", [*OTHERS, "scaling", "form", "dtype", "needs", "adapters"])
def test_another_geometry_has_no_plan_yet(launches: Any, bound: list[str], change: str) -> None:
    def once(values: Any, dtype: torch.dtype = BF16, **options: Any) -> None:
        call, trains = options.pop("call", fused("silu")), options.pop("trains", ("x", "first.A"))
        run(call, values, dtype, trains)

    def scaled(x: Tensor, index: Tensor, w: Tensor, first: Any, second: Any) -> Tensor:
        return fused("silu")(x, index, w, first, {**second, "scaling": 0.8})

    def in_float32(x: Tensor, index: Tensor, w: Tensor, first: Any, second: Any) -> Tensor:
        first = {**first, "A": first["A"].float(), "B": first["B"].float()}
        return fused("silu")(x, index, w, first, second)

    for seed in range(3):
        once(values_of(seed))
    before = len(bound)
    options: dict[str, Any] = {
        "scaling": {"call": scaled},
        "form": {"call": fused("clamped")},
        "dtype": {"dtype": FP16},
        "needs": {"trains": ("x", "first.A", "second.A")},
        "adapters": {"call": in_float32},
    }.get(change, {})
    once(values_of(3, **OTHERS.get(change, {})), **options)
    assert len(bound) > before


@pytest.mark.offline
def test_a_square_weight_that_is_stored_transposed_has_another_plan(
    launches: Any, bound: list[str]
) -> None:
    """Nothing else of it differs: as many bytes, of the same shape."""
    sizes = {"bias": False, "hidden": 64, "inner": 32}
    for transposed in (False, False, False, True):
        before = len(bound)
        run(project, values_of(nf4=transposed, **sizes), BF16, ("x", "first.A", "first.B"))
    assert len(bound) > before


@pytest.mark.offline
def test_a_gate_of_a_module_runs_between_plans(
    launches: Any, bound: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it calls, operations of ours among them, is part of no plan of the block."""
    calls: list[Tensor] = []
    weight = torch.ones(2 * SIZES["inner"], 2 * SIZES["inner"])

    def gate(rows: Tensor) -> Tensor:
        calls.append(rows)
        factors = (torch.ones(4, rows.shape[1]), torch.ones(rows.shape[1], 4))
        rows = adapted_linear(rows, weight, A=factors[0], B=factors[1])
        first, second = rows.chunk(2, dim=-1)
        return first * second

    monkeypatch.setitem(GATES, "own", ({"activation": gate}, *GATES["own"][1:]))
    before = []
    for seed in range(5):
        run(fused("own"), values_of(seed), FP32, trained("own"))
        before.append((len(calls), len(bound), len(launches)))
    each = before[0][2]
    assert [n for n, _, _ in before] == [2, 4, 6, 8, 10]  # once in forward, once in backward
    assert [n for _, _, n in before] == [each * i for i in range(1, 6)]
    assert before[-1][1] == before[2][1] < 3 * each


@pytest.mark.offline
def test_tensors_of_other_kinds_are_not_repeated(launches: Any, bound: list[str]) -> None:
    class Own(Tensor):
        pass

    def call(x: Tensor, *others: Any) -> Tensor:
        return fused("silu")(x.as_subclass(Own), *others)

    with torch.no_grad():
        for seed in range(4):
            run_forward(call, values_of(seed))
    assert len(bound) == len(launches) > 0


def run_forward(call: Callable[..., Tensor], values: Any) -> Tensor:
    x, index, w, *both = values
    return call(x, index, w, *({**factors, "scaling": 0.7} for factors in both))


@pytest.mark.compiled
@each_case
def test_repeated_results_have_the_same_bits(case: str) -> None:
    """Executed: of other values and another routing than those that the plan was made with."""
    from tests import ptx_executor

    with ptx_executor.installed(90), lora_fast.set_backend("triton"):
        plain = []
        for seed in (1, 2, 3):
            triton_plans.forget()
            plain.append(results(case, seed))
        triton_plans.forget()
        for expected, seed in zip([*plain, plain[0]], (1, 2, 3, 1), strict=True):
            for name, value in results(case, seed).items():
                if value is not None:
                    assert_same_bits(value, expected[name], name=name)


@pytest.mark.offline
def test_experts_of_the_backend_are_the_planned_ones() -> None:
    from lora_fast.backends.selection import experts_for

    with stub_driver.recording(90), lora_fast.set_backend("triton"):
        assert experts_for(torch.zeros(1, dtype=BF16)) is triton_expert_plans
