"""The choice of the backend: of the process, of a thread or task, of a backward pass."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from backend_calls import watch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_fast import set_backend
from lora_fast.backends.choice import get_backend
from lora_fast.backends.torch_ops import TorchBackend
from lora_fast.functional import Member, adapted_linear, adapted_linears


def test_a_block_restores_the_choice():
    before = get_backend()
    with set_backend("triton"):
        assert get_backend() == "triton"
        with set_backend("torch"):
            assert get_backend() == "torch"
        assert get_backend() == "triton"
    assert get_backend() == before


def test_a_call_sets_the_choice():
    before = get_backend()
    try:
        set_backend("torch")
        assert get_backend() == "torch"
    finally:
        set_backend(before)


def test_a_block_is_for_its_thread_alone():
    """Overlapping blocks (in 1, in 2, out 1, out 2) leave the process unchanged."""
    before = get_backend()
    seen: dict[str, list[str]] = {"triton": [], "torch": []}
    turns = {name: threading.Barrier(2) for name in ("in 1", "in 2", "out 1", "out 2")}

    def run(name: str, enters: str, leaves: str) -> None:
        with ExitStack() as stack:
            for turn, barrier in turns.items():
                if turn == enters:
                    stack.enter_context(set_backend(name))
                elif turn == leaves:
                    stack.close()
                barrier.wait(10)
                seen[name].append(get_backend())

    threads = [
        threading.Thread(target=run, args=("triton", "in 1", "out 1")),
        threading.Thread(target=run, args=("torch", "in 2", "out 2")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {
        "triton": ["triton", "triton", before, before],
        "torch": [before, "torch", "torch", before],
    }
    assert get_backend() == before


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Python switches threads as often as it can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_another_thread() -> str:
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.append(get_backend()))
    thread.start()
    thread.join()
    return seen[0]


def test_other_threads_never_see_a_block():
    """Neither in it nor on the way in, between the call and the start of the block."""
    before, seen = get_backend(), []

    class Watched(set_backend):
        def __enter__(self) -> None:
            seen.append(in_another_thread())
            super().__enter__()

    for name in ("torch", "triton"):
        with Watched(name):
            assert get_backend() == name
            seen.append(in_another_thread())
    assert seen == [before] * 4
    assert get_backend() == before


def test_blocks_that_a_with_statement_does_not_call_leave_nothing_behind(hasty_threads):
    before = get_backend()

    def override(name: str) -> None:
        for _ in range(2000):
            with ExitStack() as stack:
                stack.enter_context(set_backend(name))
                assert get_backend() == name

    threads = [threading.Thread(target=override, args=(n,)) for n in ("torch", "triton") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert get_backend() == before


def test_a_call_is_for_all_threads_and_a_block_may_be_entered_again():
    before = get_backend()
    try:
        with set_backend("triton"):
            set_backend("torch")
            assert get_backend() == "triton", "the block goes first"
            assert in_another_thread() == "torch"
        assert get_backend() == "torch"
        kept = set_backend("triton")
        assert get_backend() == "triton"
        with kept:
            with kept:
                assert get_backend() == "triton"
            assert get_backend() == "triton"
        assert get_backend() == "torch"
    finally:
        set_backend(before)


def test_a_block_is_for_its_task_alone():
    async def run(name: str, seen: list[str]) -> None:
        with set_backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(get_backend())

    async def both() -> list[list[str]]:
        seen: list[list[str]] = [[], []]
        tasks = [run(name, found) for name, found in zip(("torch", "triton"), seen, strict=True)]
        await asyncio.gather(*tasks)
        return seen

    assert asyncio.run(both()) == [["torch"] * 3, ["triton"] * 3]


def one_layer(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return adapted_linear(x, W, A=A, B=B)


def two_layers(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return sum(adapted_linears(x, [Member(W, None, A, B), Member(W, None, A, B)]))


@pytest.mark.parametrize(
    ("operation", "layers"),
    [(one_layer, 1), (two_layers, 2), (torch.compile(one_layer, backend="aot_eager"), 1)],
    ids=["layer", "group", "compiled"],
)
def test_a_backward_pass_uses_what_its_forward_used(operation, layers, monkeypatch):
    """Outside of the block, in another thread, in another's block."""
    calls = watch(monkeypatch)
    W, A, B = torch.randn(5, 4), torch.randn(2, 4, requires_grad=True), torch.randn(5, 2)
    with set_backend("torch"):
        ys = [operation(torch.randn(3, 4), W, A, B).sum() for _ in range(3)]

    def in_a_block() -> None:
        with set_backend("triton"):
            ys[1].backward()

    ys[0].backward()
    thread = threading.Thread(target=in_a_block)
    thread.start()
    thread.join()
    in_a_block_of_this_thread = set_backend("triton")
    with in_a_block_of_this_thread:
        ys[2].backward()
    assert calls[-6:] == [(name, "torch", layers) for name in ["forward"] * 3 + ["backward"] * 3]


def test_operators_leave_the_choice_alone(monkeypatch):
    from lora_fast.operation import compiled_ops

    seen = []
    forward = TorchBackend.forward

    def spied(*args):
        seen.append(get_backend())
        return forward(*args)

    monkeypatch.setattr(TorchBackend, "forward", spied)
    W, none = torch.randn(5, 4), (None,) * 6
    flat = compiled_ops.FlatWeight.of(W)
    compiled_ops.adapted_linear(
        torch.randn(3, 4), *flat, *none, None, None, 1.0, 0.0, [False] * 8, "torch",
        compiled_ops.REVISION,
    )  # fmt: skip
    assert seen == [get_backend()]


def test_what_a_thread_of_autograd_computes_again_uses_the_block_around_backward():
    """Reentrant checkpoints nested so deeply that autograd continues in another thread."""
    seen: list[tuple[int, str]] = []

    def deep(x: Tensor, depth: int) -> Tensor:
        seen.append((threading.get_ident(), get_backend()))
        return checkpoint(deep, x, depth - 1, use_reentrant=True) if depth else x * 2

    with set_backend("torch"):
        deep(torch.ones(2, requires_grad=True), 70).sum().backward()
    assert len({thread for thread, _ in seen}) > 1, "this torch computes it all in one thread"
    assert {backend for _, backend in seen} == {"torch"}


def test_a_compiled_function_follows_the_choice_of_its_thread():
    before = get_backend()

    @torch.compile(backend="eager", fullgraph=True)
    def which(x: Tensor) -> Tensor:
        return x + ("auto", "triton", "torch").index(get_backend())

    def found() -> int:
        return int(which(torch.zeros(())))

    seen = []
    try:
        set_backend("auto")
        with set_backend("torch"):
            thread = threading.Thread(target=lambda: seen.append(found()))
            thread.start()
            thread.join()
            seen.append(found())
        set_backend("triton")
        seen.append(found())
    finally:
        set_backend(before)
    assert seen == [0, 2, 1]


def test_a_block_inside_of_a_compiled_function():
    before = get_backend()

    @torch.compile(backend="eager", fullgraph=True)
    def both(x: Tensor) -> Tensor:
        with set_backend("torch"):
            y = x + (get_backend() == "torch")
        return 2 * y + (get_backend() == "torch")

    try:
        set_backend("auto")
        assert both(torch.zeros(())) == 2
        assert get_backend() == "auto"
    finally:
        set_backend(before)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="name must be one of auto, triton, torch, got 'cuda'"):
        set_backend("cuda")


def test_the_environment_is_read_and_checked():
    code = "from lora_fast.backends.choice import get_backend; print(get_backend())"
    root = str(Path(__file__).resolve().parents[2])

    def run(value: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "LORA_FAST_BACKEND": value, "PYTHONPATH": root}
        return subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
        )

    assert run("triton").stdout.strip() == "triton"
    bad = run("gpu")
    assert bad.returncode != 0
    assert "LORA_FAST_BACKEND must be one of auto, triton, torch, got 'gpu'" in bad.stderr
