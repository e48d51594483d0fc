"""When the tuner times nothing: few rows, no GPU, captured and compiled calls, ranks that wait."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from tuner_clocks import CPU, FORWARD_QUERY, OTHER, PLANS, clock_for
from tuner_queries import PLAIN

from lora_fast.tuning import timing, tuner
from lora_fast.tuning.cache import Cache, versions
from lora_fast.tuning.plans import FUSED, HYBRID
from lora_fast.tuning.tuner import Place, Tuner

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _place(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_FAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuner, "place_of", lambda device: Place("H100", 90))


def test_few_rows_are_not_timed(tmp_path):
    clock = clock_for(OTHER)
    for M in (1, 16, 64):
        asked = PLAIN._replace(M=M)
        assert Tuner(times=True, timer=clock).plan(asked, CPU, clock.run) == FUSED
    assert clock.ran == [] and list(tmp_path.iterdir()) == []


def test_without_a_gpu_nothing_is_timed(monkeypatch):
    """Unless somebody brings a clock, as these tests do."""
    monkeypatch.setattr(timing, "on_device", lambda *arguments: pytest.fail("timed"))
    assert Tuner(times=True).plan(PLAIN, CPU, pytest.fail) == HYBRID


CIRCUMSTANCES = ["capturing", "compiling", "recomputing", "deterministic", "not the first rank"]


@pytest.fixture
def circumstance(request, monkeypatch):
    """In which nothing may be timed."""
    if request.param == "capturing":
        monkeypatch.setattr(timing, "reason_not_to_time", _as_on_a_gpu)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    elif request.param == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    elif request.param == "recomputing":
        monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 3)
    elif request.param == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    else:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setattr(tuner, "_PATIENCE_SECONDS", 0.0)
    return request.param


_reason = timing.reason_not_to_time


def _as_on_a_gpu(device, *, forward):
    return _reason(torch.device("cuda"), forward=forward)


@pytest.mark.parametrize("circumstance", CIRCUMSTANCES, indirect=True)
def test_nothing_is_timed(circumstance, tmp_path):
    clock = clock_for(OTHER)
    ours = Tuner(times=True, timer=clock)
    assert ours.plan(FORWARD_QUERY, CPU, clock.run) == HYBRID
    assert clock.ran == [] and list(tmp_path.glob("*.json")) == []


def test_what_was_chosen_without_a_clock_stays(monkeypatch):
    """A shape captured with one plan keeps that plan afterwards."""
    clock = clock_for(OTHER)
    ours = Tuner(times=True, timer=clock)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert ours.plan(PLAIN, CPU, clock.run) == HYBRID
    assert ours.plan(PLAIN, CPU, clock.run) == HYBRID
    assert clock.ran == []


def test_a_backward_pass_is_timed_where_a_recomputed_forward_pass_is_not():
    """In a real one: forward, then forward again and backward within torch's backward pass."""
    clock = clock_for(OTHER)
    ours, asked = Tuner(times=True, timer=clock), []

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            asked.append(("forward", ours.plan(FORWARD_QUERY, CPU, clock.run)))
            return x.clone()

        @staticmethod
        def backward(ctx, dY):
            asked.append(("backward", ours.plan(PLAIN, CPU, clock.run)))
            return dY

    x = torch.ones(2, requires_grad=True)
    # The original forward pass is not asked for here, as where a graph was captured meanwhile.
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        hook = torch.ones(2, requires_grad=True) * 1
        hook.register_hook(lambda grad: Layer.apply(x).detach())
    hook.sum().backward()
    assert asked == [("forward", HYBRID)] and clock.ran == []
    Layer.apply(x).sum().backward()
    assert asked[1:] == [("forward", HYBRID), ("backward", OTHER)]
    assert clock.ran == list(PLANS)


def test_under_deterministic_algorithms_the_file_does_not_count(monkeypatch):
    clock = clock_for(OTHER)
    ours = Tuner(times=True, timer=clock)
    assert ours.plan(PLAIN, CPU, clock.run) == OTHER
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert ours.plan(PLAIN, CPU, clock.run) == HYBRID
    monkeypatch.undo()
    monkeypatch.setattr(tuner, "place_of", lambda device: Place("H100", 90))
    assert ours.plan(PLAIN, CPU, clock.run) == OTHER


@pytest.mark.parametrize("circumstance", CIRCUMSTANCES[:3] + CIRCUMSTANCES[4:], indirect=True)
def test_what_was_timed_before_is_used(monkeypatch, circumstance, request):
    """The file of an earlier run, or of the first rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK", raising=False)
        Cache(versions("H100")).put(FORWARD_QUERY.key, OTHER.name, {})
    clock = clock_for(HYBRID)
    assert Tuner(times=True, timer=clock).plan(FORWARD_QUERY, CPU, clock.run) == OTHER
    assert clock.ran == []


def test_the_other_ranks_wait_a_while_in_all(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(tuner, "_PATIENCE_SECONDS", 0.3)
    clock = clock_for(OTHER)
    ours = Tuner(times=True, timer=clock)
    started = time.monotonic()
    for M in (2048, 8192):
        assert ours.plan(PLAIN._replace(M=M), CPU, clock.run) == HYBRID
    assert 0.3 <= time.monotonic() - started < 3.0
    assert ours._patience == 0.0 and clock.ran == []


def test_a_rank_without_patience_still_reads_what_the_first_has_stored(monkeypatch):
    """It lost its patience over a shape that rank 0 never met."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(tuner, "_PATIENCE_SECONDS", 0.0)
    clock = clock_for(HYBRID)
    ours = Tuner(times=True, timer=clock)
    assert ours.plan(PLAIN._replace(K=2048), CPU, clock.run) == HYBRID
    Cache(versions("H100")).put(PLAIN.key, OTHER.name, {})
    assert ours.plan(PLAIN, CPU, clock.run) == OTHER and clock.ran == []


def test_nobody_waits_for_a_file_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_FAST_CACHE_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(Cache, "wait_for", lambda *arguments: pytest.fail("waited"))
    with pytest.warns(RuntimeWarning, match="nothing is timed"):
        assert Tuner(times=True, timer=clock_for(OTHER)).plan(PLAIN, CPU, pytest.fail) == HYBRID


def test_nobody_waits_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(Cache, "wait_for", lambda *arguments: pytest.fail("waited"))
    monkeypatch.setattr(timing, "reason_not_to_time", lambda device, *, forward: "captured")
    assert Tuner(times=True, timer=clock_for(OTHER)).plan(PLAIN, CPU, pytest.fail) == HYBRID


def test_two_processes_have_the_plan_of_the_first(tmp_path):
    """Rank 1 starts first and finds nothing; rank 0 times, slowly, and stores."""
    code = """
import sys, time
sys.path.insert(0, {support!r})
import torch
from tuner_queries import PLAIN
from lora_fast.tuning import cost_model, tuner
from lora_fast.tuning.timing import Measured

tuner.place_of = lambda device: tuner.Place("H100", 90)
plans, ran = cost_model.shortlist(PLAIN, 90), []

def clock(call, left):
    time.sleep(0.6)
    call()
    return Measured(float(len(plans) - len(ran)), 0.1)

chosen = tuner.Tuner(times=True, timer=clock).plan(PLAIN, torch.device("cpu"), ran.append)
print(len(ran), chosen.name)
"""
    code = code.format(support=str(ROOT / "tests" / "support"))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LORA_FAST_CACHE_DIR": str(tmp_path / "shared")}
    ranks = []
    for rank in ("1", "0"):
        command = [sys.executable, "-c", code]
        ranks.append(
            subprocess.Popen(command, env={**env, "RANK": rank}, stdout=-1, stderr=-1, text=True)
        )
        time.sleep(0.5)
    (second, _), (first, said) = (process.communicate(timeout=120) for process in ranks)
    assert first.split(maxsplit=1) == [str(len(PLANS)), PLANS[-1].name + "\n"]
    assert second.split(maxsplit=1) == ["0", PLANS[-1].name + "\n"]
    # Rank 0 took more than a second, and said so once.
    assert said.count("lora_fast: timing 3 ways to compute the backward of 4096 → 4096") == 1
