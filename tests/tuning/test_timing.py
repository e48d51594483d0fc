"""Timing a call within a budget, and when nothing may be timed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint

from lora_fast.tuning import timing

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Device:
    """Calls that take `milliseconds` each on a clock that stands still otherwise."""

    def __init__(self, monkeypatch, milliseconds):
        self.now, self.calls, self.milliseconds = 0.0, 0, milliseconds
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(timing, "_l2_sized", lambda: None)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self):
        # The first call compiles.
        self.now += 10.0 if self.calls == 0 else self.milliseconds / 1e3
        self.calls += 1


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = self.device.now

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


@pytest.mark.parametrize(
    ("milliseconds", "left", "calls"),
    [(1.0, 2.0, 25), (10.0, 2.0, 11), (200.0, 2.0, 3), (600.0, 2.0, 2), (900.0, 2.0, 1),
     (5000.0, 2.0, 1), (200.0, 0.3, 1)],
)  # fmt: skip
def test_as_many_calls_as_fit_and_compilation_is_not_counted(
    monkeypatch, milliseconds, left, calls
):
    device = Device(monkeypatch, milliseconds)
    found = timing.on_device(device.call, left)
    assert device.calls == calls + 1
    assert found.milliseconds == pytest.approx(milliseconds)
    # With the first, whose launch alone is counted.
    assert found.seconds == pytest.approx(device.calls * milliseconds / 1e3)
    assert calls == 1 or found.seconds <= left


def test_without_memory_to_spare_the_l2_stays_warm(monkeypatch):
    properties = SimpleNamespace(L2_cache_size=1 << 20)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "empty", full)
    assert timing._l2_sized() is None


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert timing.reason_not_to_time(GPU, forward=True) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert timing.reason_not_to_time(GPU, forward=False) == "a CUDA graph is captured"
    assert timing.reason_not_to_time(CPU, forward=False) is None


def test_a_recomputed_forward_pass_is_one_within_a_backward_pass():
    seen = []

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(timing.reason_not_to_time(CPU, forward=True))
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, dY):
            (x,) = ctx.saved_tensors
            seen.append(timing.reason_not_to_time(CPU, forward=False))
            return dY * x

    x = torch.ones(2, requires_grad=True)
    for reentrant in (False, True):
        seen.clear()
        y = torch.utils.checkpoint.checkpoint(Layer.apply, x, use_reentrant=reentrant)
        y.sum().backward()
        assert seen == [None, "a forward pass is recomputed", None]


@pytest.mark.parametrize(("value", "rank"), [(None, 0), ("0", 0), ("3", 3), ("", 0), ("x", 0)])
def test_the_rank_is_torchrun_s(monkeypatch, value, rank):
    monkeypatch.delenv("RANK", raising=False)
    if value is not None:
        monkeypatch.setenv("RANK", value)
    assert timing.rank() == rank


def test_the_rank_is_that_of_the_process_group(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert timing.rank() == 1


@pytest.mark.gpu
def test_a_gpu_s_time_is_that_of_its_kernels():
    a = torch.randn(1024, 1024, device="cuda")
    found = timing.on_device(lambda: a @ a, 1.0)
    assert 0.0 < found.milliseconds < 100.0 and found.seconds < 1.0
