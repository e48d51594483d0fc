"""Launch plans: later calls repeat the launches of earlier ones, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gated_checks
import pytest
import torch
from checked_plans import bound_launches, leave_unchecked
from torch import Tensor

import lora_fast
from bench.instruments.accuracy import assert_same_bits
from lora_fast.functional import Member, adapted_linear, adapted_linears, gated_mlp

pytestmark = pytest.mark.offline
M, K, N, R = 40, 64, 48, 8
BF16 = torch.bfloat16


@pytest.fixture
def launches() -> Iterator[Any]:
    """The launches of a block on a stub for sm_90."""
    from bench.instruments import stub_driver

    with stub_driver.recording(90) as log, lora_fast.set_backend("triton"):
        yield log.launches


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch, launches: Any) -> list[str]:
    """The kernels whose launches went through Triton's binder."""
    return bound_launches(monkeypatch)


@pytest.fixture
def with_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch multiplies with W, as on a GPU, where there are more than a few rows."""
    from lora_fast.backends import selection, triton_plans

    backend = triton_plans.PlannedTritonBackend(cublas=True)
    monkeypatch.setattr(selection, "_triton", lambda name: backend)


def factors(dtype: torch.dtype = BF16) -> dict[str, Any]:
    made = {"A": torch.zeros(R, K), "B": torch.zeros(N, R)}
    trained = {name: t.requires_grad_() for name, t in made.items()}
    return {"weight": torch.zeros(N, K, dtype=dtype), "scaling": 2.0, **trained}


def step(x: Tensor | None = None, **changed: Any) -> tuple[Tensor, ...]:
    x = torch.zeros(2, M // 2, K, dtype=BF16) if x is None else x
    given = {**factors(), **changed}
    y = adapted_linear(x.requires_grad_(), **given)
    wanted = [t for t in (x, given["A"], given["B"]) if t.requires_grad]
    return torch.autograd.grad(y, wanted, torch.ones_like(y))


class _Elsewhere(Tensor):
    """A tensor that says that it lies on another device."""

    _there: torch.device

    @staticmethod
    def __new__(cls, x: Tensor, device: torch.device) -> _Elsewhere:
        made = x.as_subclass(cls)
        made._there = device
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._there


def described(launch: Any) -> Any:
    return launch.name, launch.grid, launch.arguments, launch.constexprs, launch.kernel


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_third_call_launches_the_same_without_the_binder(
    launches: Any, bound: list[str], p: float
) -> None:
    for _ in range(2):
        step(dropout_p=p, dropout_seed=7)
    assert len(bound) == 8
    step(dropout_p=p, dropout_seed=7)
    assert len(bound) == 8
    first, third = launches[:4], launches[8:]
    assert [launch.name for launch in third] == [launch.name for launch in first]
    for one, other in zip(first, third, strict=True):
        assert described(one)[:2] == described(other)[:2]
        assert one.constexprs == other.constexprs
        assert one.kernel is other.kernel
        assert one.arguments.get("seed_low") == other.arguments.get("seed_low")


def test_an_activation_alone_is_repeated(launches: Any, bound: list[str]) -> None:
    """Of layers that are all computed elsewhere, as DoRA's are: no seeds, no low rank."""
    x = torch.zeros(2, 40, K, dtype=BF16)
    for _ in range(3):
        gate, up = (torch.zeros(2, 40, N, dtype=BF16, requires_grad=True) for _ in range(2))
        h = gated_mlp(x, gate, up, None, "silu")
        torch.autograd.grad(h, [gate, up], torch.zeros_like(h))
    assert launches and 3 * len(bound) == 2 * len(launches)


@pytest.mark.parametrize(
    ("fused", "p"), [(False, 0.0), (True, 0.0), (False, 0.1)], ids=["apart", "fused", "dropout"]
)
def test_a_gated_mlp_is_repeated_without_the_binder(
    launches: Any, bound: list[str], monkeypatch: pytest.MonkeyPatch, fused: bool, p: float
) -> None:
    mlp = gated_checks.MLP(BF16, BF16, M=70, ranks=(8, 8, 8), fused=fused, p=p)
    for seeds in ((5, 6), (7, 8), (9, 10)):
        monkeypatch.setattr(gated_checks, "SEEDS", seeds)
        o = replace(gated_checks.make(replace(mlp, p=0.0)), mlp=mlp)
        gated_checks.fused(o, o.leaves).backward(o.dY)
    each = len(launches) // 3
    assert "gated_backward" in bound and len(bound) == 2 * each
    for one, other in zip(launches[:each], launches[2 * each :], strict=True):
        assert described(one)[:2] == described(other)[:2] and one.kernel is other.kernel
        # x and h have masks of their own: seed 5 has become 9, and 6 has become 10.
        seeds = [launch.arguments.get("seed_low") for launch in (one, other)]
        assert seeds in ([None, None], [0, 0], [5, 9], [6, 10])


def test_a_plan_takes_the_seed_of_its_call(launches: Any, bound: list[str]) -> None:
    for seed in (1, 2, 3 + (5 << 32)):
        step(dropout_p=0.1, dropout_seed=seed)
    assert len(bound) == 8
    for launch in (launches[8], launches[10], launches[11]):
        assert (launch.arguments["seed_low"], launch.arguments["seed_high"]) == (3, 5)


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "rows": lambda: {"x": torch.zeros(M + 1, K, dtype=BF16)},
    "strides": lambda: {"x": torch.zeros(K, M, dtype=BF16).t()},
    "alignment": lambda: {"x": torch.zeros(M * K + 1, dtype=BF16)[1:].view(M, K)},
    "dtype of A and B": lambda: {
        "A": torch.zeros(R, K, dtype=BF16, requires_grad=True),
        "B": torch.zeros(N, R, dtype=BF16, requires_grad=True),
    },
    "strides of the weight": lambda: {"weight": torch.zeros(K, N, dtype=BF16).t()},
    "scaling": lambda: {"scaling": 3.0},
    "bias": lambda: {"bias": torch.zeros(N, dtype=BF16)},
    "frozen A": lambda: {"A": torch.zeros(R, K)},
    "dropout": lambda: {"dropout_p": 0.5, "dropout_seed": 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_geometry_has_no_plan_yet(launches: Any, bound: list[str], change: str) -> None:
    for _ in range(3):
        step()
    repeated = len(bound)
    step(**CHANGES[change]())
    assert len(bound) > repeated


@pytest.mark.parametrize("change", CHANGES)
def test_repeated_launches_are_those_that_triton_would_choose(launches: Any, change: str) -> None:
    for _ in range(3):  # compared by the fixture of all tests
        step()
        step(**CHANGES[change]())


def test_a_change_of_what_surrounds_launches_is_noticed(
    launches: Any, bound: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from lora_fast.kernels import ticketed_gemm

    for _ in range(3):
        step()
    seen: list[Any] = []
    triton.knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        step()
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(seen) == 4
    hook = seen.append
    monkeypatch.setattr(
        ticketed_gemm.ticketed_gemm, "pre_run_hooks", [lambda *args, **kwargs: hook(args)]
    )
    step()
    assert len(seen) == 6


def test_nothing_is_recorded_while_a_graph_is_captured(
    launches: Any, bound: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_fast.backends import triton_plans

    monkeypatch.setattr(triton_plans, "is_capturing", lambda device: True)
    for _ in range(3):
        step()
    assert len(bound) == 12


def test_a_failed_launch_of_a_plan_leaves_no_words_behind(
    launches: Any, bound: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_fast.kernels import launch_plans, workspace

    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("a launch failed")

    with monkeypatch.context() as patched:
        patched.setattr(launch_plans, "runner_of", lambda *_: failing)
        for _ in range(2):
            step()
        assert workspace._cache
        with pytest.raises(RuntimeError, match="a launch failed"):
            step()
    assert not workspace._cache


def test_operands_off_the_current_device_mean_no_plan(
    launches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where x lies on another device than the current one, a launch moves there; a plan would
    not."""
    from lora_fast.kernels import launch_plans
    from triton.runtime.driver import driver

    monkeypatch.setattr(driver.active, "get_current_device", lambda: 0)
    for index in (0, 1):
        there = _Elsewhere(torch.zeros(2, 2), torch.device("cuda", index))
        assert launch_plans.Recorder([there]).gives_up == (index != 0)


def test_autocast_does_not_cast_the_products_of_a_plan(launches: Any) -> None:
    """A backward pass may run under another autocast than its forward pass."""
    from lora_fast.kernels import launch_plans

    a, b = torch.randn(4, 8), torch.randn(8, 3)
    with launch_plans.Recorder([a, b]) as recorder:
        plan = recorder.plan(launch_plans.called(torch.mm, a, b))
    with torch.autocast("cpu", torch.bfloat16):
        found = plan.run([a, b])
    assert_same_bits(found, torch.mm(a, b), name="y")


def test_a_tensor_that_nobody_noted_means_no_plan(launches: Any, bound: list[str]) -> None:
    """A bias that is not contiguous is copied on the way."""
    bias = torch.zeros(2 * N, dtype=BF16)[::2]
    for _ in range(3):
        step(bias=bias)
    forwards = [name for name in bound if name == "ticketed_gemm"]
    assert len(forwards) >= 3


def group(x: Tensor, dYs: list[Tensor], p: float = 0.0) -> tuple[Tensor, ...]:
    members = []
    for n in (N, 16, 32):
        A, B = torch.randn(R, K, requires_grad=True), torch.randn(n, R, requires_grad=True)
        members.append(Member(torch.zeros(n, K, dtype=BF16), None, A, B, 1.0))
    ys = adapted_linears(x, members, dropout_p=p, dropout_seed=3 if p else None)
    factors = [factor for member in members for factor in (member.A, member.B)]
    return torch.autograd.grad(ys, [x, *factors], dYs)


@pytest.mark.parametrize("lead", [(M,), (80,), (2, 40)], ids=str)
def test_a_group_is_repeated(
    with_cublas: None, launches: Any, bound: list[str], lead: tuple[int, ...]
) -> None:
    x = torch.zeros(*lead, K, dtype=BF16, requires_grad=True)
    dYs = [torch.zeros(*lead, n, dtype=BF16) for n in (N, 16, 32)]
    for _ in range(3):
        group(x, dYs, 0.1)
    assert len(bound) == 2 * len(launches) // 3


def test_a_part_of_a_tensor_goes_to_the_launcher_as_an_address(
    launches: Any, bound: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The S of a group lie side by side in one allocation."""
    from lora_fast.kernels import launch_plans, plan_memory

    asked: list[tuple[int, int]] = []

    def noting(tensor: Tensor, start: int, shape: Any, strides: Any) -> Any:
        part = tensor.view(-1)[start // tensor.element_size() :]
        found = plan_memory.address(tensor, start, shape, strides)
        asked.append((found.data_ptr(), part.data_ptr()))
        return found

    monkeypatch.setattr(launch_plans, "address", noting)
    x = torch.zeros(80, K, dtype=BF16, requires_grad=True)
    for _ in range(3):
        group(x, [torch.zeros(80, n, dtype=BF16) for n in (N, 16, 32)])
    assert len(asked) == 4
    assert all(found == there for found, there in asked)
    last = [launch.arguments for launch in launches[2 * len(launches) // 3 :]]
    given = {a.data_ptr() for of in last for a in of.values() if hasattr(a, "data_ptr")}
    assert given.issuperset(found for found, _ in asked)


@pytest.mark.compiled
def test_a_part_of_a_tensor_lies_in_memory_that_a_launch_is_given(
    with_cublas: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An executor on the CPU refuses accesses to memory of which no argument tells."""
    from tests import ptx_executor

    leave_unchecked(monkeypatch)
    x = torch.zeros(80, K, dtype=BF16, requires_grad=True)
    with ptx_executor.installed(90), lora_fast.set_backend("triton"):
        for _ in range(3):
            group(x, [torch.zeros(80, n, dtype=BF16) for n in (N, 16, 32)])


def test_gradients_that_were_one_tensor_may_be_several(launches: Any, bound: list[str]) -> None:
    x = torch.zeros(M, K, dtype=BF16, requires_grad=True)

    def run(dYs: list[Tensor]) -> list[int]:
        members = []
        for _ in dYs:
            A = torch.zeros(R, K, requires_grad=True)
            members.append(Member(torch.zeros(N, K, dtype=BF16), None, A, torch.zeros(N, R)))
        ys = adapted_linears(x, members)
        torch.autograd.grad(ys, [x], dYs)
        return [id(dY) for dY in dYs]

    one = torch.zeros(M, N, dtype=BF16)
    for _ in range(3):
        run([one, one])
    before = len(bound)
    run([one, torch.zeros(M, N, dtype=BF16)])
    assert len(bound) > before


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("lead", "p"), [((M,), 0.0), ((M,), 0.3), ((2, 40), 0.0), ((1, 2, 40), 0.3)], ids=str
)
def test_repeated_results_have_the_same_bits(
    with_cublas: None, lead: tuple[int, ...], p: float
) -> None:
    """Executed: of other tensors than the plan was made with, as often as wanted. Of many rows,
    PyTorch adds a product to what a launch made as a matrix."""
    from lora_fast.backends import triton_plans
    from tests import ptx_executor

    def results(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        given = {
            "A": torch.randn(R, K, requires_grad=True),
            "B": torch.randn(N, R, requires_grad=True),
            "weight": torch.randn(N, K).to(BF16),
        }
        x = torch.randn(*lead, K).to(BF16).requires_grad_()
        y = adapted_linear(x, **given, dropout_p=p, dropout_seed=seed if p else None)
        wanted = [x, given["A"], given["B"]]
        return [y.detach(), *torch.autograd.grad(y, wanted, torch.randn(y.shape).to(BF16))]

    with ptx_executor.installed(90), lora_fast.set_backend("triton"):
        plain = []
        for seed in (1, 2, 3):
            triton_plans.forget()
            plain.append(results(seed))
        triton_plans.forget()
        for expected, seed in zip([*plain, plain[0]], (1, 2, 3, 1), strict=True):
            for one, other in zip(results(seed), expected, strict=True):
                assert_same_bits(one, other, name="result")
