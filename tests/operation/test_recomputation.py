"""NF4 weights under activation checkpointing: decoded once for a recomputed forward and its
backward pass, with the same bits, within the limit, and released."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lora_models import nf4_linear
from machines import MACHINES, Executor, started
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fast
from bench.instruments.accuracy import assert_same_bits
from lora_fast import NF4Weight, functional
from lora_fast.backends import selection
from lora_fast.four_bit import decoded

pytest.importorskip("triton")
from lora_fast.backends.triton_ops import TritonBackend
from lora_fast.tuning.plans import AUGMENTED, HYBRID, Plan

pytestmark = pytest.mark.usefixtures("released_weights")
M, K = 40, 64
WIDTHS = (72, 40, 64)
# Decoded bytes in bfloat16 of all weights.
EVERYTHING = 2 * K * sum(WIDTHS)


class Step:
    """Two layers that read x, and one that reads their product, in NF4."""

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16):
        torch.manual_seed(0)
        self.x = torch.randn(M, K, dtype=dtype, device=device).requires_grad_()
        self.members = []
        for N, k in zip(WIDTHS, (K, K, 40), strict=True):
            W = torch.randn(N, k, dtype=dtype).to(device)
            A, B = (torch.randn(*shape).to(device).requires_grad_() for shape in ((5, k), (N, 5)))
            weight = NF4Weight.from_dense(W)
            self.members.append(functional.Member(weight, None, A, B, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        a, b = functional.adapted_linears(x, self.members[:2], dropout_p=0.2)
        last = self.members[2]
        h = a[:, :40] * b
        return functional.adapted_linear(h, last.weight, A=last.A, B=last.B, dropout_p=0.2)

    def run(self, reentrant: bool | None) -> list[Tensor]:
        """The output and all gradients, checkpointed unless `reentrant` is None."""
        leaves = [self.x, *(t for member in self.members for t in (member.A, member.B))]
        for leaf in leaves:
            leaf.grad = None
        torch.manual_seed(3)
        if reentrant is None:
            y = self.forward(self.x)
        else:
            y = checkpoint(self.forward, self.x, use_reentrant=reentrant)
        y.square().sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The N of every weight that the torch backend decodes."""
    found: list[int] = []
    original = NF4Weight.dequantize

    def counted(self: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
        found.append(self.shape[0])
        return original(self, dtype)

    monkeypatch.setattr(NF4Weight, "dequantize", counted)
    return found


@pytest.mark.parametrize("reentrant", [True, False])
def test_decoded_once_for_a_recomputed_forward_and_its_backward(
    decodes: list[int], reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lora_fast.set_backend("torch"):
        step = Step()
        expected = step.run(None)
        assert sorted(decodes) == sorted(2 * WIDTHS)
        decodes.clear()
        actual = step.run(reentrant)
        assert sorted(decodes) == sorted(2 * WIDTHS), "forward, and recomputed forward"
        monkeypatch.setattr(decoded.bytes_saved, "told", 0)
        decodes.clear()
        without = step.run(reentrant)
        assert sorted(decodes) == sorted(3 * WIDTHS)
    for a, b, c in zip(actual, without, expected, strict=True):
        assert_same_bits(a, b, name="with and without")
        assert_same_bits(a, c, name="not checkpointed")


ROUTES = {
    "augmented": (AUGMENTED, HYBRID),
    "hybrid": (HYBRID, HYBRID),
    "workspace": (Plan(workspace=True), Plan(workspace=True)),
    # The decoded W is there: nothing decodes it in the product.
    "in the backward GEMM": (HYBRID, Plan(workspace=False)),
}
COMPILED = ("augmented", "in the backward GEMM")


def _machines_and_routes() -> Iterator[Any]:
    """Every route interpreted and two of them on sm_90; the rest is exhaustive."""
    for name, machine, marks in MACHINES:
        for route in ROUTES:
            chosen = not name.startswith("sm_") or (name == "sm_90" and route in COMPILED)
            marked = marks if chosen else [*marks, pytest.mark.exhaustive]
            yield pytest.param(machine, route, id=f"{name}-{route}", marks=marked)


@pytest.mark.parametrize(("machine", "route"), list(_machines_and_routes()))
def test_the_kernels_decode_once(
    machine: Callable[[], Executor], route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(machine()) as executor:
        check_decodes(executor, route, monkeypatch)


def check_decodes(executor: Executor, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, (forward, backward) = TritonBackend(cublas=True), ROUTES[route]
    monkeypatch.setattr(selection, "_triton", lambda name: backend)
    monkeypatch.setattr(
        backend, "_plan", lambda op, *_: forward if op.startswith("forward") else backward
    )
    step = Step(executor.device)

    def run(limit: int) -> tuple[int, list[Tensor]]:
        monkeypatch.setattr(decoded.bytes_saved, "told", limit)
        with executor.counting_launches() as launches:
            results = step.run(reentrant=False)
        return sum(name.startswith("nf4") for name in launches), results

    once, results = run(1 << 40)
    again, expected = run(0)
    in_backward = 3 if backward.workspace is not False else 0
    assert (once, again) == (6, 6 + in_backward)
    if in_backward:
        for a, b in zip(results, expected, strict=True):
            assert_same_bits(a, b, name=route)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_limit_holds(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks: list[int] = []
    take = decoded.bytes_saved.take

    def watched(W: Tensor) -> bool:
        taken = take(W)
        peaks.append(decoded.bytes_saved.saved)
        return taken

    monkeypatch.setattr(decoded.bytes_saved, "take", watched)
    with lora_fast.set_backend("torch"):
        step = Step()
        for limit, peak in ((EVERYTHING, 2 * (K * (72 + 40) + 40 * 64)), (2 * K * 72, 2 * K * 72)):
            monkeypatch.setattr(decoded.bytes_saved, "told", limit)
            peaks.clear()
            step.run(reentrant)
            assert max(peaks) == peak
            assert decoded.bytes_saved.saved == 0


def test_nothing_is_saved_outside_of_a_backward_pass(decodes: list[int]) -> None:
    """Not without checkpointing, nor by a checkpointed forward whose backward never comes."""
    with lora_fast.set_backend("torch"):
        step = Step()
        y = step.forward(step.x)
        z = checkpoint(step.forward, step.x, use_reentrant=False)
        assert decoded.bytes_saved.saved == 0
        del y, z


def test_other_hooks_get_no_weight() -> None:
    """Offloading to the CPU would copy the weight there."""
    shapes = []

    def pack(t: Tensor) -> Tensor:
        shapes.append(tuple(t.shape))
        return t

    with lora_fast.set_backend("torch"):
        step = Step()

        def offloaded(x: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                return step.forward(x)

        y = checkpoint(offloaded, step.x, use_reentrant=True)
        y.sum().backward()
    assert (M, K) in shapes and (WIDTHS[0], K) not in shapes


def test_a_second_backward_decodes_again() -> None:
    """With retain_graph what checkpointing recomputed is recomputed again."""
    with lora_fast.set_backend("torch"):
        step = Step()
        y = checkpoint(step.forward, step.x, use_reentrant=False).sum()
        (first,) = torch.autograd.grad(y, step.x, retain_graph=True)
        (second,) = torch.autograd.grad(y, step.x)
    assert_same_bits(second, first, name="dX")


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(*(nn.Linear(64, N) for N in widths)) for widths in ((64,), (64, 32))
        )
        self.head = nn.Linear(64, 640)


def test_the_limit_is_what_the_largest_block_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded.bytes_saved, "told", None)
    monkeypatch.setattr(decoded.bytes_saved, "largest_block", 0)
    model: Any = Blocks()
    for block in model.layers:
        for name, linear in list(block.named_children()):
            setattr(block, name, nf4_linear(linear, torch.bfloat16))
    lora_fast.convert(model, "all-linear")
    assert decoded.bytes_saved.limit == 2 * 64 * (64 + 32)


@pytest.mark.parametrize(
    ("value", "limit"), [("0", 0), ("64", 64 << 20), ("-1", None), ("x", None)]
)
def test_the_variable_is_read(value: str, limit: int | None) -> None:
    code = "from lora_fast.four_bit import decoded; print(decoded.bytes_saved.limit)"
    environment = {"LORA_FAST_DECODED_MB": value, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    if limit is None:
        assert "LORA_FAST_DECODED_MB must be a whole number ≥ 0" in done.stderr
    else:
        assert done.stdout.split() == [str(limit)]
