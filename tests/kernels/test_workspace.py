"""Synchronisation words per stream and per captured launch, also on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from equation import Case, eager, exact, fused, make
from lora_fast.kernels import workspace

import lora_fast
from bench.instruments.accuracy import assert_all_accurate, assert_same_bits
from lora_fast.functional import adapted_linear

BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
TRAINING = Case(M=300, K=256, N=320, R=16, dtype=BF16, adapter_dtype=FP32)
LARGE = Case(M=2048, K=1024, N=1024, R=16, dtype=BF16, adapter_dtype=FP32)


class FakeDevice(NamedTuple):
    type: str = "cuda"
    index: int = 0


GPU = FakeDevice()


@pytest.fixture
def device(monkeypatch):
    """A GPU whose memory is on the host; which stream is current, and whether it captures."""
    now = SimpleNamespace(stream=7, capturing=False)
    for name, empty in (("_cache", {}), ("_arenas", {}), ("_full", [])):
        monkeypatch.setattr(workspace, name, empty)
    monkeypatch.setattr(
        workspace, "_zeros", lambda count, device: torch.zeros(count, dtype=torch.int32)
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capturing)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=now.stream)
    )
    return now


@pytest.fixture
def kernels():
    """The kernels alone, whatever the tuner would choose."""
    with lora_fast.set_backend("triton"):
        yield


def _range(words):
    return words.data_ptr(), words.data_ptr() + 4 * words.numel()


def _overlap(a, b):
    (first_a, last_a), (first_b, last_b) = _range(a), _range(b)
    return first_a < last_b and first_b < last_a


def test_a_stream_keeps_its_words_and_shares_them_with_no_other(device):
    first = workspace.sync_words(GPU, 10)
    assert workspace.sync_words(GPU, 500).data_ptr() == first.data_ptr()
    device.stream = 8
    assert not _overlap(workspace.sync_words(GPU, 10), first)
    device.stream = 7
    assert workspace.sync_words(GPU, 10).data_ptr() == first.data_ptr()


def test_more_words_are_new_and_zero():
    many = workspace.sync_words(CPU, 5000)
    assert many.numel() >= 5000
    assert many.eq(0).all()
    assert workspace.sync_words(CPU, 10).data_ptr() == many.data_ptr()


def test_captured_launches_share_words_with_nothing(device, monkeypatch):
    eager_words = workspace.sync_words(GPU, 66)
    device.capturing = True
    cleared = []
    monkeypatch.setattr(workspace, "_zeros", lambda *args: cleared.append(args))
    taken = [workspace.sync_words(GPU, count) for count in (3, 66, 3, 33, 32)]
    assert cleared == []
    for i, words in enumerate(taken):
        assert words.eq(0).all()
        # As aligned as a buffer of its own: other alignments would be other kernels.
        assert (words.data_ptr() - taken[0].data_ptr()) % 128 == 0
        assert not any(_overlap(words, other) for other in [eager_words, *taken[:i]])
    workspace.forget()
    assert not any(_overlap(workspace.sync_words(GPU, 3), words) for words in taken)


def test_an_arena_is_replaced_before_it_is_full_and_kept(device):
    workspace.sync_words(GPU, 3)
    device.capturing = True
    taken = [workspace.sync_words(GPU, 1000) for _ in range(40)]
    device.capturing = False
    workspace.sync_words(GPU, 3)
    assert [arena.used for arena in workspace._full] == [40 * 1024]
    device.capturing = True
    assert not any(_overlap(workspace.sync_words(GPU, 3), words) for words in taken)


def test_without_an_arena_the_graph_clears_its_own_words(device):
    device.capturing = True
    assert workspace.sync_words(GPU, 10).numel() == 10
    device.capturing = False
    workspace.sync_words(GPU, 3)
    device.capturing = True
    assert workspace.sync_words(GPU, 70000).numel() == 70000


def _check(operands, results):
    assert_all_accurate(
        results, exact(operands), eager(operands), compute_dtype=operands.case.dtype, name="gpu"
    )


@pytest.mark.gpu
def test_streams_at_once_give_the_bits_of_one(kernels):
    operands = [make(LARGE, "cuda") for _ in range(4)]
    expected = fused(operands[0])
    _check(operands[0], expected)
    streams = [torch.cuda.Stream() for _ in operands]
    torch.cuda.synchronize()
    for _ in range(10):
        found = []
        for stream, operand in zip(streams, operands, strict=True):
            with torch.cuda.stream(stream):
                found.append(fused(operand))
        torch.cuda.synchronize()
        for results in found:
            for name, value in expected.items():
                assert_same_bits(results[name], value, name=name)


def _captured(operands):
    """A graph of a forward and backward pass, and the tensors that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fused(operands)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = fused(operands)
    return graph, results


@pytest.mark.gpu
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("M", [1, 16, 64, 300, 1024])
def test_a_graph_replays_what_was_captured(kernels, M, nf4):
    operands = make(Case(M=M, K=256, N=320, R=16, dtype=BF16, adapter_dtype=FP32, nf4=nf4), "cuda")
    expected = fused(operands)
    graph, results = _captured(operands)
    for _ in range(5):
        for value in results.values():
            value.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for name, value in expected.items():
            assert_same_bits(results[name], value, name=name)
    # Another x in the same memory: a replay computes, it does not remember.
    with torch.no_grad():
        operands.tensors["x"].mul_(-0.5)
    graph.replay()
    torch.cuda.synchronize()
    _check(operands, results)


@pytest.mark.gpu
def test_graphs_may_replay_at_once_beside_eager_launches(kernels):
    operands = [make(LARGE, "cuda") for _ in range(2)]
    expected = fused(operands[0])
    graphs = [_captured(operand) for operand in operands]
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(10):
        torch.cuda.synchronize()
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        beside = fused(operands[0])
        torch.cuda.synchronize()
        for results in (beside, *(results for _, results in graphs)):
            for name, value in expected.items():
                assert_same_bits(results[name], value, name=name)


@pytest.mark.gpu
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("M", [1, 7, 16, 33, 64])
def test_few_rows_are_one_kernel_of_a_graph(kernels, M, nf4):
    """No memset and no decoding: a replay of a linear without gradients is one kernel."""
    operands = make(Case(M=M, K=512, N=512, R=16, dtype=BF16, nf4=nf4), "cuda")
    t = operands.tensors

    def call():
        return adapted_linear(t["x"], operands.weight, t["bias"], A=t["A"], B=t["B"], scaling=0.5)

    with torch.no_grad():
        expected = call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
    y.zero_()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    assert_same_bits(y, expected, name="y")
    ran = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    # Tests fill what is allocated with NaN.
    ran = [name for name in ran if "FillFunctor" not in name]
    assert ran == ["ticketed_gemm"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_need_not_be_on_the_current_device(kernels):
    torch.cuda.set_device(0)
    operands = make(TRAINING, "cuda:1")
    results = fused(operands)
    assert torch.cuda.current_device() == 0
    assert all(value.device == torch.device("cuda", 1) for value in results.values())
    _check(operands, results)
    first = fused(make(TRAINING, "cuda:0"))
    for name, value in first.items():
        assert_same_bits(results[name].to("cuda:0"), value, name=name)
