"""What decides, and when: the model, the cache or timing."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from lora_fast.kernels.out_of_resources import instead_of
from triton.runtime.errors import OutOfResources
from tuner_queries import FP32, PLAIN

from lora_fast.factors import Needs
from lora_fast.tuning import cost_model, timing, tuner
from lora_fast.tuning.cache import Cache, versions
from lora_fast.tuning.plans import FORWARD, FUSED, HYBRID
from lora_fast.tuning.timing import Measured
from lora_fast.tuning.tuner import Place, Tuner, _descent

CPU = torch.device("cpu")
PLANS = cost_model.shortlist(PLAIN, 90)
OTHER = PLANS[-1]
FORWARD_QUERY = PLAIN._replace(op=FORWARD, needs=(Needs(),))
ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """Runs what it times, and answers from a list of milliseconds by plan; each takes `seconds`."""

    def __init__(self, times, seconds=0.01):
        self.times, self.ran, self.seconds, self.left = times, [], seconds, []

    def __call__(self, call, left):
        call()
        self.left.append(left)
        return Measured(self.times[self.ran[-1]], self.seconds)

    def run(self, plan):
        self.ran.append(plan)


@pytest.fixture(autouse=True)
def _place(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_FAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuner, "place_of", lambda device: Place("H100", 90))


def _clock(fastest):
    return Clock({plan: 1.0 if plan == fastest else 2.0 for plan in PLANS})


def test_without_timing_the_model_decides_and_no_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "Cache", lambda header: pytest.fail("asked the cache"))
    clock = _clock(OTHER)
    chosen = Tuner(times=False, timer=clock).plan(PLAIN, CPU, clock.run)
    assert chosen == cost_model.pick(PLAIN, 90) == HYBRID
    assert clock.ran == []
    assert list(tmp_path.iterdir()) == []


def test_few_rows_are_not_timed(tmp_path):
    clock = _clock(OTHER)
    for M in (1, 16, 64):
        asked = PLAIN._replace(M=M)
        assert Tuner(times=True, timer=clock).plan(asked, CPU, clock.run) == FUSED
    assert clock.ran == [] and list(tmp_path.iterdir()) == []


def test_without_a_gpu_nothing_is_timed(monkeypatch):
    """Unless somebody brings a clock, as these tests do."""
    monkeypatch.setattr(timing, "on_device", lambda *arguments: pytest.fail("timed"))
    assert Tuner(times=True).plan(PLAIN, CPU, pytest.fail) == HYBRID


@pytest.mark.parametrize("fastest", PLANS, ids=[plan.name for plan in PLANS])
def test_each_candidate_is_timed_once_and_the_fastest_kept(fastest):
    clock = _clock(fastest)
    ours = Tuner(times=True, timer=clock)
    assert [ours.plan(PLAIN, CPU, clock.run) for _ in range(3)] == [fastest] * 3
    assert clock.ran == list(PLANS)
    # Another process finds it on disk.
    later = Clock({})
    assert Tuner(times=True, timer=later).plan(PLAIN, CPU, later.run) == fastest
    assert later.ran == []


def test_another_query_or_device_is_timed_anew(monkeypatch):
    clock = _clock(OTHER)
    ours = Tuner(times=True, timer=clock)
    ours.plan(PLAIN, CPU, clock.run)
    many = PLAIN._replace(M=8192)
    clock.times |= dict.fromkeys(cost_model.shortlist(many, 90), 3.0)
    ours.plan(many, CPU, clock.run)
    assert len(clock.ran) == 2 * len(PLANS)
    monkeypatch.setattr(tuner, "place_of", lambda device: Place("A100", 80))
    clock.times |= dict.fromkeys(cost_model.shortlist(PLAIN, 80), 3.0)
    ours.plan(PLAIN, CPU, clock.run)
    assert len(clock.ran) == 3 * len(PLANS)


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
    clock = _clock(OTHER)
    ours = Tuner(times=True, timer=clock)
    assert ours.plan(FORWARD_QUERY, CPU, clock.run) == HYBRID
    assert clock.ran == [] and list(tmp_path.glob("*.json")) == []


def test_what_was_chosen_without_a_clock_stays(monkeypatch):
    """A shape captured with one plan keeps that plan afterwards."""
    clock = _clock(OTHER)
    ours = Tuner(times=True, timer=clock)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert ours.plan(PLAIN, CPU, clock.run) == HYBRID
    assert ours.plan(PLAIN, CPU, clock.run) == HYBRID
    assert clock.ran == []


def test_a_backward_pass_is_timed_where_a_recomputed_forward_pass_is_not():
    """In a real one: forward, then forward again and backward within torch's backward pass."""
    clock = _clock(OTHER)
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
    clock = _clock(OTHER)
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
    clock = _clock(HYBRID)
    assert Tuner(times=True, timer=clock).plan(FORWARD_QUERY, CPU, clock.run) == OTHER
    assert clock.ran == []


def test_the_other_ranks_wait_a_while_in_all(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(tuner, "_PATIENCE_SECONDS", 0.3)
    clock = _clock(OTHER)
    ours = Tuner(times=True, timer=clock)
    started = time.monotonic()
    for M in (2048, 8192):
        assert ours.plan(PLAIN._replace(M=M), CPU, clock.run) == HYBRID
    assert 0.3 <= time.monotonic() - started < 3.0
    assert ours._patience == 0.0 and clock.ran == []


def test_nobody_waits_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(Cache, "wait_for", lambda *arguments: pytest.fail("waited"))
    monkeypatch.setattr(timing, "reason_not_to_time", lambda device, *, forward: "captured")
    assert Tuner(times=True, timer=_clock(OTHER)).plan(PLAIN, CPU, pytest.fail) == HYBRID


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


def test_no_more_device_time_than_the_budget():
    clock = _clock(PLANS[0])
    clock.seconds = 1.5
    assert Tuner(times=True, timer=clock).plan(PLAIN, CPU, clock.run) == PLANS[0]
    assert clock.left == [2.0, 0.5] and clock.ran == list(PLANS[:2])


def test_a_timing_of_less_than_a_second_says_nothing(capsys):
    clock = _clock(OTHER)
    Tuner(times=True, timer=clock).plan(PLAIN, CPU, clock.run)
    assert capsys.readouterr().err == ""


def test_progress_goes_to_a_handler_if_there_is_one(monkeypatch, caplog, capsys):
    monkeypatch.setattr(tuner, "_SILENT_SECONDS", 0.01)
    clock = _clock(OTHER)
    ran = clock.run
    clock.run = lambda plan: (time.sleep(0.05), ran(plan))
    with caplog.at_level("INFO", logger="lora_fast.tuning"):
        Tuner(times=True, timer=clock).plan(PLAIN, CPU, clock.run)
    (line,) = caplog.messages
    assert line.startswith("lora_fast: timing 3 ways to compute the backward of 4096 → 4096, up to")
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_leaves_the_choice_to_the_model(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_FAST_CACHE_DIR", str(tmp_path / "file" / "below"))
    clock = _clock(OTHER)
    ours = Tuner(times=True, timer=clock)
    with pytest.warns(RuntimeWarning, match="nothing is timed") as caught:
        assert ours.plan(PLAIN, CPU, clock.run) == HYBRID
        assert ours.plan(PLAIN._replace(K=2048), CPU, clock.run) == HYBRID
    assert len(caught) == 1 and clock.ran == []


def test_a_file_in_a_folder_that_cannot_be_written_is_read(monkeypatch):
    Cache(versions("H100")).put(PLAIN.key, OTHER.name, {})
    monkeypatch.setattr(Cache, "is_writable", lambda self: False)
    clock = _clock(HYBRID)
    ours = Tuner(times=True, timer=clock)
    assert ours.plan(PLAIN, CPU, clock.run) == OTHER
    assert ours.plan(PLAIN._replace(K=2048), CPU, clock.run) == HYBRID
    assert clock.ran == []


def test_a_damaged_file_is_timed_anew(tmp_path):
    Cache(versions("H100")).put(PLAIN.key, OTHER.name, {})
    (file,) = tmp_path.glob("*.json")
    file.write_text(file.read_text()[:-20])
    clock = _clock(OTHER)
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert Tuner(times=True, timer=clock).plan(PLAIN, CPU, clock.run) == OTHER
    assert clock.ran == list(PLANS)


def test_a_file_of_an_older_version_is_left_alone(tmp_path):
    older = {name: value for name, value in versions("H100").items() if name != "format"}
    Cache(older).put(PLAIN.key, "composed", {"composed": 1.0})
    (file,) = tmp_path.glob("*.json")
    before = file.read_text()
    clock = _clock(OTHER)
    assert Tuner(times=True, timer=clock).plan(PLAIN, CPU, clock.run) == OTHER
    assert clock.ran == list(PLANS)
    assert file.read_text() == before and len(list(tmp_path.glob("*.json"))) == 2


def test_a_plan_that_is_no_candidate_any_more_is_not_taken():
    clock = _clock(OTHER)
    ours = Tuner(times=True, timer=clock)
    ours.plan(PLAIN, CPU, clock.run)
    (file,) = (cache.path for cache in ours._caches.values())
    file.write_text(file.read_text().replace(f'"plan": "{OTHER.name}"', '"plan": "os.system"'))
    assert Tuner(times=True, timer=clock).plan(PLAIN, CPU, clock.run) == OTHER
    assert len(clock.ran) == 2 * len(PLANS)
    # It is replaced on disk, too: the next process times nothing.
    later = Clock({})
    assert Tuner(times=True, timer=later).plan(PLAIN, CPU, later.run) == OTHER
    assert later.ran == []


@pytest.mark.parametrize(("hip", "arch"), [(None, 94), ("6.4", None)], ids=["nvidia", "amd"])
def test_a_gpu_of_another_vendor_has_no_compute_capability(monkeypatch, hip, arch):
    properties = SimpleNamespace(name="a GPU", major=9, minor=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert tuner._gpu.__wrapped__(0) == Place("a GPU", arch)


@pytest.mark.parametrize(
    ("error", "warns"),
    [
        (torch.OutOfMemoryError("out of memory"), False),
        (OutOfResources(300, 200, "shared memory"), True),
        (RuntimeError("PassManager::run failed"), True),
    ],
    ids=["memory", "resources", "compiler"],
)
def test_a_candidate_that_fails_is_left_out(error, warns):
    clock = _clock(HYBRID)

    def run(plan):
        if plan == HYBRID:
            raise error
        clock.run(plan)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = Tuner(times=True, timer=clock).plan(PLAIN, CPU, run)
    assert chosen != HYBRID
    assert [str(w.message).startswith("lora_fast: hybrid cannot") for w in caught] == [True] * warns


class SmallDevice(Clock):
    """Two launches a plan, of which the second has no room for the tiles of `too_large`; notes the
    tiles that both ran with."""

    def __init__(self, times, too_large):
        super().__init__(times)
        self.too_large = too_large

    def run(self, plan):
        ran = [self._launch(plan.gemm, ()), self._launch(plan.gemm, self.too_large)]
        self.ran.append(plan)
        assert plan.gemm in ran

    def _launch(self, config, too_large):
        try:
            if config in too_large:
                raise OutOfResources(300, 200, "shared memory")
        except OutOfResources:
            return self._launch(instead_of(config), too_large)
        return config


def test_what_ran_in_place_of_a_plan_that_does_not_fit_is_kept():
    large = next(plan for plan in PLANS if plan.gemm is not None)
    first, second = itertools.islice(_descent(large), 1, 3)
    assert first not in PLANS and second not in PLANS
    device = SmallDevice({**dict.fromkeys(PLANS, 2.0), second: 1.0}, (large.gemm, first.gemm))
    ours = Tuner(times=True, timer=device)
    assert ours.plan(PLAIN, CPU, device.run) == second
    # Timed again with tiles that fit both launches; nothing is stored for tiles that did not run.
    assert device.ran[device.ran.index(large) + 1] == second
    (file,) = ours.kept()
    (entry,) = json.loads(file.read_text())["plans"].values()
    assert entry["plan"] == second.name
    assert entry["milliseconds"].keys() == {plan.name for plan in (*PLANS, second)} - {large.name}
    # Another process finds it on disk.
    later = Clock({})
    assert Tuner(times=True, timer=later).plan(PLAIN, CPU, later.run) == second
    assert later.ran == []


def test_if_nothing_can_be_timed_the_model_decides_and_nothing_is_kept(tmp_path):
    def run(plan):
        raise torch.OutOfMemoryError("out of memory")

    assert Tuner(times=True, timer=Clock({})).plan(PLAIN, CPU, run) == HYBRID
    assert list(tmp_path.glob("*.json")) == []


def test_threads_time_a_query_once():
    clock = _clock(OTHER)
    ours = Tuner(times=True, timer=clock)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(ours.plan(PLAIN, CPU, clock.run)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [OTHER] * 8
    assert clock.ran == list(PLANS)


def test_float32_is_left_to_cublas_without_a_clock():
    asked = PLAIN._replace(M=8192, dtype=FP32, weights=(FP32,))
    assert Tuner(times=False).plan(asked, CPU, lambda plan: None) == HYBRID


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True), (None, True)])
def test_the_environment_decides(monkeypatch, value, expected):
    monkeypatch.delenv("LORA_FAST_AUTOTUNE", raising=False)
    if value is not None:
        monkeypatch.setenv("LORA_FAST_AUTOTUNE", value)
    assert tuner._times_by_environment() is expected


def test_other_values_are_refused(monkeypatch):
    monkeypatch.setenv("LORA_FAST_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="LORA_FAST_AUTOTUNE must be 0 or 1, got 'yes'"):
        tuner._times_by_environment()
