"""Four threads call one model: groups, DoRA, mixed batches; each gets bitwise what it gets
alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attentions import Attention, stock_model
from lora_models import K, accelerated_copy, counted, float64_copy, lora_config, peft_model
from torch import Tensor, nn

import lora_fast
from bench.instruments.accuracy import assert_all_accurate, assert_same_bits, orders

THREADS, CALLS, INPUTS, SAMPLES = 4, 500, 12, 4
NAMES = ["default", "other", "__base__", "other"]


class Narrow(nn.Module):
    """One layer behind the 32 columns of the attention, called with the adapters of its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, K)

    def forward(self, x: Tensor, **adapters: Any) -> Tensor:
        return self.fc(x, **adapters)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = stock_model(base=Attention)
        self.mixed = peft_model(model=Narrow())
        self.mixed.add_adapter("other", lora_config(r=3, lora_alpha=9))
        self.dora = peft_model(use_dora=True)

    def forward(self, x: Tensor) -> Tensor:
        # Past PEFT's own forward, which hangs the names on hooks that all threads would see.
        mixed = self.mixed.get_base_model()
        return self.dora(mixed(self.attention(x), adapter_names=NAMES))


def result(model: nn.Module, number: int, *, grad: bool) -> dict[str, Tensor]:
    """The output for one of a few inputs, and with gradients that of the input."""
    generator = torch.Generator().manual_seed(number)
    rows = 1 + 7 * (number % 5)
    x = torch.randn(SAMPLES, rows, K, generator=generator)
    x = x.to(next(model.parameters()).dtype).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y = model(x)
    found = {"y": y.detach()}
    if grad:
        found["x"] = torch.autograd.grad(y, x, torch.ones_like(y))[0]
    return found


@pytest.fixture(params=[None, 1e-6], ids=["as usual", "hasty"])
def switching(request: pytest.FixtureRequest) -> Iterator[None]:
    """How long Python stays with one thread while others wait."""
    interval = sys.getswitchinterval()
    if request.param is not None:
        sys.setswitchinterval(request.param)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("switching")
def test_threads_on_one_model() -> None:
    stock = Net().eval()
    fused = accelerated_copy(stock)
    modes = [(number, grad) for number in range(INPUTS) for grad in (False, True)]
    alone = {mode: result(fused, mode[0], grad=mode[1]) for mode in modes}
    start, failures = threading.Barrier(THREADS), []

    def serve(thread: int) -> None:
        start.wait(60)
        try:
            for call in range(CALLS):
                number, grad = modes[(thread * 5 + call) % len(modes)]
                for name, value in result(fused, number, grad=grad).items():
                    assert_same_bits(value, alone[number, grad][name], name=name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    fused_calls, fallbacks = counted(fused)
    assert (fused_calls, fallbacks) == (5 * (THREADS * CALLS + len(modes)), {})
    wide = float64_copy(stock)
    for (number, grad), actual in alone.items():
        eager = orders(lambda number=number, grad=grad: result(stock, number, grad=grad))
        exact = result(wide, number, grad=grad)
        assert_all_accurate(actual, exact, eager, compute_dtype=torch.float32, name=str(number))


def test_the_model_has_what_threads_could_confuse() -> None:
    report = lora_fast.report(accelerated_copy(Net()))
    assert [len(layer.siblings) for layer in report.layers] == [2, 2, 2, 0, 0]
    assert report.all_fused
