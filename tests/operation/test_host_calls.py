"""Python calls before a launch, which determine the time of a single token's forward pass.

Counted are calls of Python functions in this package, which no machine makes faster or slower.
Those of Triton's launcher, of torch and of PEFT are theirs to count.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gated_models
import pytest
import torch
from attentions import stock_model
from checked_plans import launcher_of, leave_unchecked
from expert_models import FUSES
from lora_models import K, accelerated_copy, counted, lora_layers, peft_model

import lora_fast
from bench.expert_blocks import Block, build, step_of

BF16 = torch.bfloat16
PACKAGE = Path(lora_fast.__file__).parent
KERNELS = PACKAGE.parent / "kernels"
WALK = PACKAGE.parent / "docs" / "kernels.md"
# Of (kind, gradients): the most calls in lora_fast and in its kernels. A change may take fewer; one
# that takes more makes every layer of every token slower.
# On a CPU that multiplies no bfloat16 it takes a call more, and of one row with float32 adapters
# (the module) four, which find that out.
TORCH = {
    ("dense", False): (24, 0),
    ("dense", True): (27, 0),
    ("nf4", False): (32, 0),
    ("module", False): (45, 0),
}
# Of a third call, which repeats launches.
TRITON = {
    ("dense", False): (16, 3),
    ("dense", True): (18, 3),
    ("nf4", False): (21, 3),
}
# Of a backward pass: of one layer, of q, k and v, of a gated MLP, of a block of experts.
TORCH_BACKWARD = {"dense": 32, "nf4": 35, "group": 57, "mlp": 131, "experts": 672}
TRITON_BACKWARD = {
    "dense": (6, 3),
    "nf4": (7, 3),
    "group": (8, 5),
    "mlp": (29, 4),
    "experts": (12, 6),
}
# Forward, of those of several layers.
TORCH_TOGETHER = {"experts": 390}
TRITON_TOGETHER = {"group": (60, 11), "mlp": (91, 4), "experts": (98, 5)}
OF_A_GROUP = {True: 83, False: 78}
# Of one row, on a CPU: each by itself.
OF_THREE_ALONE = {True: 93, False: 84}
# As many as gate, up and down by themselves; the activation is part of it.
OF_AN_MLP = {True: 126, False: 96}
# Functions of ours between a layer's forward and a launch, and the files that they are in; where
# there is no launch plan yet, more.
MOST_FRAMES, MOST_FILES = 6, 5
MOST_FRAMES_AT_FIRST, MOST_FILES_AT_FIRST = 10, 7
# All calls of a layer to those of stock PEFT's, which run some operations more.
MOST_OF_PEFT = 2.75


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Calls of Python functions in the block, by where the function is: ours, the kernels, …"""
    found: Counter[str] = Counter()

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            found[_home(frame.f_code.co_filename)] += 1

    sys.setprofile(count)
    try:
        yield found
    finally:
        sys.setprofile(None)


def _home(file: str) -> str:
    path = Path(file)
    if KERNELS in path.parents:
        return "kernels"
    if PACKAGE in path.parents:
        return "lora_fast"
    return "triton" if "triton" in path.parts else "other"


def calls_of(layer: Any, *, gradients: bool) -> Counter[str]:
    x = torch.zeros(1, 1, K, dtype=BF16, requires_grad=gradients)
    with torch.set_grad_enabled(gradients):
        for _ in range(2):
            layer(x)
        with counting() as found:
            layer(x)
    return found


def layer_of(kind: str) -> tuple[Any, Any]:
    """A fused layer, and the stock one."""
    stock = peft_model("dense" if kind == "module" else kind, BF16, BF16, BF16)
    if kind == "module":
        linear = torch.nn.Linear(K, 8, dtype=BF16)
        return lora_fast.LoRALinear.from_linear(linear, r=4), lora_layers(stock)[0]
    return lora_layers(accelerated_copy(stock))[0], lora_layers(stock)[0]


def check(kind: str, gradients: bool, budget: tuple[int, int]) -> tuple[int, int]:
    """All calls of the fused layer, and of the stock one."""
    fused, stock = layer_of(kind)
    ours, theirs = (calls_of(layer, gradients=gradients) for layer in (fused, stock))
    assert fused._lora_fast_calls.fused == 3
    most_of_layer, most_of_kernels = budget
    assert ours["lora_fast"] <= most_of_layer
    assert ours["kernels"] <= most_of_kernels
    return sum(ours.values()), sum(theirs.values())


@pytest.mark.parametrize(("kind", "gradients"), TORCH, ids=str)
def test_torch_backend(kind: str, gradients: bool) -> None:
    with lora_fast.set_backend("torch"):
        ours, theirs = check(kind, gradients, TORCH[kind, gradients])
    assert ours <= MOST_OF_PEFT * theirs


@pytest.mark.parametrize("gradients", OF_A_GROUP)
@pytest.mark.parametrize("rows", [1, 65])
def test_group(rows: int, gradients: bool) -> None:
    """q, k and v, with what it takes to find each other."""
    x = torch.zeros(rows, K, requires_grad=gradients)
    fused = lora_fast.accelerate(stock_model())
    attention = fused.get_base_model()
    with lora_fast.set_backend("torch"), torch.set_grad_enabled(gradients):
        attention(x)
        with counting() as found:
            attention(x)
    assert counted(fused) == (6, {})
    budget = OF_THREE_ALONE if rows == 1 else OF_A_GROUP
    assert found["lora_fast"] <= budget[gradients]


@pytest.mark.parametrize("gradients", OF_AN_MLP)
def test_gated_mlp(gradients: bool) -> None:
    """gate, up and down with their activation, and the proof that they are."""
    fused = lora_fast.accelerate(gated_models.stock_model())
    x = torch.zeros(2, gated_models.H, requires_grad=gradients)
    with lora_fast.set_backend("torch"), torch.set_grad_enabled(gradients):
        fused(x)
        with counting() as found:
            fused(x)
    assert gated_models.counts(fused) == (2, {})
    assert found["lora_fast"] <= OF_AN_MLP[gradients]


@pytest.fixture
def as_users_run(monkeypatch: pytest.MonkeyPatch, allocating_as_users_do: None) -> None:
    """Plans that launch without the check of all other tests."""
    leave_unchecked(monkeypatch)


@pytest.mark.offline
@pytest.mark.parametrize(("kind", "gradients"), TRITON, ids=str)
def test_triton_backend(kind: str, gradients: bool, as_users_run: None) -> None:
    from bench.instruments import stub_driver

    with stub_driver.recording(90) as log, lora_fast.set_backend("triton"):
        check(kind, gradients, TRITON[kind, gradients])
    assert log.names == ["ticketed_gemm"] * 3


def steps_of(kind: str, rows: int, dtype: torch.dtype) -> tuple[Counter[str], Counter[str]]:
    """Calls of the third forward and the third backward pass of a layer or several."""
    if kind == "experts":
        return steps_of_experts()
    if kind == "group":
        called: Any = lora_fast.accelerate(stock_model().to(dtype)).get_base_model()
    elif kind == "mlp":
        called = lora_fast.accelerate(gated_models.stock_model().to(dtype))
    else:
        called = layer_of(kind)[0]
    width = gated_models.H if kind == "mlp" else K
    x = torch.zeros(rows, width, dtype=dtype, requires_grad=True)
    return counted_steps(called, lambda: called(x))


def steps_of_experts() -> tuple[Counter[str], Counter[str]]:
    """The same of a block of 8 experts, each of which has rows."""
    if not FUSES:
        pytest.skip("PEFT or transformers lacks what experts need")
    block = Block("8 experts", 8, 2, 64, 32)
    experts = build(block, BF16)["lora_fast"]
    step, (_, index, _) = step_of(experts, block, 32, BF16)
    assert index.unique().numel() == block.E
    return counted_steps(experts, step)


def counted_steps(called: Any, step: Callable[[], Any]) -> tuple[Counter[str], Counter[str]]:
    for _ in range(3):
        with counting() as forward:
            y = step()
        loss = y.float().sum()
        with counting() as backward:
            loss.backward()
    assert lora_fast.report(called).all_fused
    return forward, backward


@pytest.mark.parametrize("kind", TORCH_BACKWARD)
def test_torch_backward(kind: str, cpu_kind: str) -> None:
    with lora_fast.set_backend("torch"):
        forward, found = steps_of(kind, 65, BF16)
    assert found["lora_fast"] <= TORCH_BACKWARD[kind]
    assert forward["lora_fast"] <= TORCH_TOGETHER.get(kind, forward["lora_fast"])


@pytest.mark.offline
@pytest.mark.parametrize("kind", TRITON_BACKWARD)
def test_triton_backward(kind: str, as_users_run: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.instruments import stub_driver
    from lora_fast.backends import triton_expert_products

    # On a CPU the products of experts are made one by one; on a GPU a kernel makes all.
    monkeypatch.setattr(triton_expert_products, "base_product_of", lambda rows, W: None)
    with stub_driver.recording(90), lora_fast.set_backend("triton"):
        forward, found = steps_of(kind, 65, BF16)
    most_of_layer, most_of_kernels = TRITON_BACKWARD[kind]
    assert found["lora_fast"] <= most_of_layer
    assert found["kernels"] <= most_of_kernels
    if kind in TRITON_TOGETHER:
        most_of_layer, most_of_kernels = TRITON_TOGETHER[kind]
        assert forward["lora_fast"] <= most_of_layer
        assert forward["kernels"] <= most_of_kernels


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str]]]:
    """The functions of ours, file and name, that are running at every launch, outermost first."""
    from lora_fast.kernels import launch_plans
    from triton.runtime.jit import JITFunction

    found: list[list[tuple[str, str]]] = []

    def noting(launch: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            way, frame = [], sys._getframe(1)
            while frame is not None:
                if _home(frame.f_code.co_filename) in ("lora_fast", "kernels"):
                    file = Path(frame.f_code.co_filename).relative_to(KERNELS.parent)
                    way.append((str(file), frame.f_code.co_qualname))
                frame = frame.f_back  # type: ignore[assignment]
            found.append(way[::-1])
            return launch(*args, **kwargs)

        return noted

    monkeypatch.setattr(JITFunction, "run", noting(JITFunction.run))
    monkeypatch.setattr(launch_plans, "runner_of", lambda *args: noting(launcher_of(*args)))
    return found


@pytest.mark.offline
def test_the_way_to_a_launch_is_as_short_as_the_documentation_says(
    as_users_run: None, ways: Any
) -> None:
    from bench.instruments import stub_driver

    with stub_driver.recording(90) as log, lora_fast.set_backend("triton"):
        layer, _ = layer_of("dense")
        for _ in range(3):
            layer(torch.zeros(1, 1, K, dtype=BF16, requires_grad=True)).sum().backward()
    assert log.names == ["ticketed_gemm", "strips", "ticketed_gemm", "strips"] * 3
    for i, way in enumerate(ways):
        repeats = i >= 8
        assert len(way) <= (MOST_FRAMES if repeats else MOST_FRAMES_AT_FIRST)
        files = {file for file, _ in way}
        assert len(files) <= (MOST_FILES if repeats else MOST_FILES_AT_FIRST)
    there, back, there_at_first, back_at_first = (
        re.findall(r"^\| `(\S+)` `(\S+)` \|", table, re.MULTILINE)
        for table in re.split(r"\| stop \|", WALK.read_text())[1:]
    )
    assert (ways[8], ways[10]) == (there, back)
    # Without the last stop, which is the plan.
    assert (ways[0], ways[2]) == (there[:-1] + there_at_first, back[:-1] + back_at_first)
