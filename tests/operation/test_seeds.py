"""Seeds of dropout: numbers, and tensors that a kernel or a captured graph reads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import attentions
import gated_models
import pytest
import torch
from equation import FACTORS, Case, Operands, fused, make
from machines import Executor
from torch.utils.checkpoint import checkpoint

import lora_fast
from bench.instruments import stub_driver
from bench.instruments.accuracy import assert_same_bits
from lora_fast import functional
from lora_fast.backends import torch_dropout
from lora_fast.operation.seeds import draw_seed

SEED = (0xDEADBEEF << 31) | 0x89ABCDEF
EXHAUSTIVE = functools.partial(pytest.param, marks=pytest.mark.exhaustive)
DROPPING = Case(M=34, K=72, N=40, R=5, p=0.4, seed=SEED)
CASES = [
    DROPPING,
    replace(DROPPING, dtype=torch.bfloat16, factors=FACTORS),
    replace(DROPPING, dtype=torch.float16, nf4=True, spans=((0, 2), (1, 5))),
]


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """As while a CUDA graph is captured: reading a tensor on the host is an error."""

    def refuse(tensor: torch.Tensor) -> int:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_dropout, "is_capturing", lambda device: True)
        for name in ("item", "__int__", "__bool__"):
            patch.setattr(torch.Tensor, name, refuse)
        yield


def with_seed(o: Operands, seed: int | torch.Tensor) -> Operands:
    """The operands with another seed; `fused` hands it over as it is."""
    o.case = replace(o.case, seed=seed)  # type: ignore[arg-type]
    return o


def assert_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (value is None) == (actual[name] is None), name
        if value is not None:
            assert_same_bits(actual[name], value, name=name)


def in_memory(device: torch.device) -> torch.Tensor:
    return torch.tensor([SEED], device=device)


def test_a_seed_in_memory_stands_for_its_number(typical_executor: Executor) -> None:
    check_equal(typical_executor, CASES[1])


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_and_with_other_factors(typical_executor: Executor, case: Case) -> None:
    check_equal(typical_executor, case)


def check_equal(executor: Executor, case: Case) -> None:
    expected = fused(make(case, executor.device))
    with executor.counting_launches() as launches:
        actual = fused(with_seed(make(case, executor.device), in_memory(executor.device)))
    assert launches.count("ticketed_gemm") == launches.count("strips") == 2
    assert_equal(actual, expected)


def test_a_group_reads_one_seed_in_memory(typical_executor: Executor) -> None:
    torch.manual_seed(0)
    device = typical_executor.device
    shapes = ((34, 72), (40, 72), (5, 72), (40, 5))
    x, W, A, B = (torch.randn(*shape).to(device) for shape in shapes)
    A, B = A.requires_grad_(), B.requires_grad_()
    members = [functional.Member(W, None, A, B, 0.5), functional.Member(W[:24], None, A, B[:24])]

    def run(seed: int | torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaf = x.clone().requires_grad_()
        ys = functional.adapted_linears(leaf, members, dropout_p=0.4, dropout_seed=seed)
        return *ys, *torch.autograd.grad([y.sum() for y in ys], (leaf, A, B))

    for a, b in zip(run(in_memory(device)), run(SEED), strict=True):
        assert_same_bits(a, b, name="group")


def test_the_torch_backend_takes_a_seed_in_memory() -> None:
    with lora_fast.set_backend("torch"):
        for case in CASES:
            actual = fused(with_seed(make(case), in_memory(torch.device("cpu"))))
            assert_equal(actual, fused(make(case)))


def test_a_captured_draw_stays_on_the_device() -> None:
    device = torch.device("cpu")
    with capturing():
        torch.manual_seed(5)
        first, second = draw_seed(device), draw_seed(device)
        torch.manual_seed(5)
        again = draw_seed(device)
    assert isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
    assert first.dtype == torch.int64 and first.shape == (1,)
    assert first.tolist() == again.tolist() != second.tolist()  # type: ignore[union-attr]


def test_a_captured_step_has_one_mask_and_the_next_another(typical_executor: Executor) -> None:
    """The same in forward, backward and recomputation: the adapter's part of Σ y is linear in each
    of A and B, so it is ⟨A, dA⟩ and ⟨B, dB⟩."""
    check_masks(typical_executor.device, reentrant=False)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_torch_backend_draws_a_captured_mask_on_the_device(reentrant: bool) -> None:
    with lora_fast.set_backend("torch"):
        check_masks(torch.device("cpu"), reentrant)


def check_masks(device: torch.device, reentrant: bool) -> None:
    o = make(DROPPING, device)
    x, A, B = (o.tensors[name].detach().requires_grad_() for name in ("x", "A", "B"))

    def call(x: torch.Tensor) -> torch.Tensor:
        return functional.adapted_linear(x, o.weight, A=A, B=B, dropout_p=DROPPING.p)

    outputs = []
    for seed, recomputes in ((1, False), (1, True), (2, True)):
        torch.manual_seed(seed)
        A.grad = B.grad = None
        with capturing():
            y = checkpoint(call, x, use_reentrant=reentrant) if recomputes else call(x)
            y.sum().backward()
        low_rank = (y - x @ o.dense.T).detach().double().sum()
        bound = torch.finfo(y.dtype).eps * DROPPING.K * y.detach().double().abs().sum()
        for factor in (A, B):
            product = (factor * factor.grad).detach().double().sum()
            assert abs((product - low_rank).tolist()) <= bound.tolist() < abs(low_rank.tolist())
        outputs.append(y.detach())
    assert_same_bits(outputs[1], outputs[0], name="same seed, recomputed")
    assert not outputs[2].equal(outputs[0])


def test_a_mask_of_splitmix64() -> None:
    """Its published outputs for seed 1234567 (as in the Java and Rosetta implementations) keep an
    element where they are not below p."""
    words = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    seed = torch.tensor([1234567])
    for p in (0.1, 0.3, 0.5, 0.9):
        mask = torch_dropout._mask_of_word(seed, 5, p)
        assert mask.tolist() == [word >= p * 2**64 for word in words]


def test_a_seed_that_changes_before_backward_is_noticed() -> None:
    o = with_seed(make(DROPPING), in_memory(torch.device("cpu")))
    t, seed = o.tensors, torch.tensor([SEED])
    y = functional.adapted_linear(
        t["x"], o.weight, A=t["A"], B=t["B"], dropout_p=0.4, dropout_seed=seed
    )
    seed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.offline
def test_every_launch_that_drops_reads_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_dropout, "is_capturing", lambda device: True)
    seeds = {}
    for p in (0.0, 0.4):
        o = make(replace(DROPPING, dtype=torch.bfloat16))
        t = o.tensors
        with stub_driver.recording(90) as log, lora_fast.set_backend("triton"):
            y = functional.adapted_linear(t["x"], o.weight, A=t["A"], B=t["B"], dropout_p=p)
            y.sum().backward()
        for launch in log.launches:
            seeds[launch.kernel.name, p] = launch.arguments.get("seed_ptr")
            assert (launch.arguments["seed_low"], launch.arguments["seed_high"]) == (0, 0)
    read = [seed for (_, p), seed in seeds.items() if p]
    assert len(read) == 4
    # dB and the parts of dS are made of dY, which is not dropped.
    assert [seed is None for seed in read] == [False, True, False, False]
    assert all(seed is None for (_, p), seed in seeds.items() if not p)


@pytest.mark.offline
@pytest.mark.parametrize("cublas", [True, False])
@pytest.mark.parametrize("kind", ["group", "mlp"])
def test_a_captured_step_reads_its_seeds_though_launches_were_recorded_before(
    kind: str, cublas: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with make_graphed_callables, which warms up first: no launch repeats a number."""
    from lora_fast.backends import selection, triton_plans

    backend = triton_plans.PlannedTritonBackend(cublas=cublas)
    monkeypatch.setattr(selection, "_triton", lambda name: backend)
    models = attentions if kind == "group" else gated_models
    model = lora_fast.accelerate(models.stock_model("nf4", lora_dropout=0.1)).train()
    width = attentions.K if kind == "group" else gated_models.H

    def seeds() -> tuple[list[str], list[str]]:
        """The launches that are given a number, and those that read a word."""
        with stub_driver.recording(90) as log, lora_fast.set_backend("triton"):
            model.get_base_model()(torch.randn(80, width, requires_grad=True)).sum().backward()
        given = [(launch.name, launch.arguments) for launch in log.launches]
        numbers = [name for name, arguments in given if arguments.get("seed_low")]
        return numbers, [name for name, arguments in given if arguments.get("seed_ptr") is not None]

    numbers, words = [seeds() for _ in range(3)][-1]
    assert len(numbers) > 3 and words == []
    for module in (torch_dropout, triton_plans):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    for _ in range(2):
        assert seeds() == ([], numbers)


@pytest.mark.offline
@pytest.mark.parametrize("dtype", [torch.bfloat16, EXHAUSTIVE(torch.float16)], ids=str)
@pytest.mark.parametrize("arch", [EXHAUSTIVE(80), 90, EXHAUSTIVE(100)])
def test_a_seed_in_memory_spills_no_more_than_a_number(arch: int, dtype: torch.dtype) -> None:
    """Registers hold it, where a number comes with the launch; it may cost a resident block."""
    found = []
    for seed in (3, torch.tensor([3])):
        x, A = (torch.zeros(rows, 4096, dtype=dtype).requires_grad_() for rows in (256, 16))
        W, dY = (torch.zeros(rows, 4096, dtype=dtype) for rows in (4096, 256))
        B = torch.zeros(4096, 16, dtype=dtype).requires_grad_()
        with stub_driver.recording(arch) as log, lora_fast.set_backend("triton"):
            y = functional.adapted_linear(
                x, W, A=A, B=B, scaling=2.0, dropout_p=0.1, dropout_seed=seed
            )
            y.backward(dY)
        found.append([launch.kernel.resources for launch in log.launches])
    for number, word in zip(*found, strict=True):
        assert word.local_bytes <= number.local_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "auto", "torch"])
def test_a_graph_draws_a_fresh_mask_at_each_replay(backend: Any) -> None:
    torch.manual_seed(0)
    layer = lora_fast.LoRALinear.from_linear(
        torch.nn.Linear(256, 128), r=8, lora_dropout=0.5
    ).cuda()
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(64, 256, device="cuda", requires_grad=True)
    with lora_fast.set_backend(backend):
        graphed = torch.cuda.make_graphed_callables(layer, (x,))
        outputs = []
        for _ in range(3):
            layer.zero_grad()
            y = graphed(x)
            y.sum().backward()
            low_rank = (y - layer.base_layer(x)).detach().double().sum()
            bound = torch.finfo(y.dtype).eps * 256 * y.detach().double().abs().sum()
            for factor in (layer.lora_A, layer.lora_B):
                product = (factor * factor.grad).detach().double().sum()
                assert abs(product - low_rank) <= bound < abs(low_rank)
            outputs.append(y.detach().clone())
    assert not outputs[0].equal(outputs[1]) and not outputs[1].equal(outputs[2])
