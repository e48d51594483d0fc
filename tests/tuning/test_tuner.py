"""What decides, and when: the model, the cache or timing."""

from __future__ import annotations

import itertools
import json
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from lora_fast.kernels.out_of_resources import instead_of
from triton.runtime.errors import OutOfResources
from tuner_queries import FP32, PLAIN

from lora_fast.tuning import cost_model, tuner
from lora_fast.tuning.plans import FUSED, HYBRID, candidates
from lora_fast.tuning.tuner import Place, Tuner, _descent

CPU = torch.device("cpu")
PLANS = candidates(PLAIN, 90)


class Clock:
    """Runs what it times, and answers from a list of milliseconds by plan."""

    def __init__(self, times):
        self.times, self.ran = times, []

    def __call__(self, call):
        call()
        return self.times[self.ran[-1]]

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
    clock = _clock(HYBRID)
    chosen = Tuner(times=False, timer=clock).plan(PLAIN, CPU, clock.run)
    assert chosen == cost_model.pick(PLAIN, 90) == FUSED
    assert clock.ran == []
    assert list(tmp_path.iterdir()) == []


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
    clock = _clock(HYBRID)
    ours = Tuner(times=True, timer=clock)
    ours.plan(PLAIN, CPU, clock.run)
    ours.plan(PLAIN._replace(M=4096), CPU, clock.run)
    assert len(clock.ran) == 2 * len(PLANS)
    monkeypatch.setattr(tuner, "place_of", lambda device: Place("A100", 80))
    clock.times |= dict.fromkeys(candidates(PLAIN, 80), 3.0)
    ours.plan(PLAIN, CPU, clock.run)
    assert len(clock.ran) == 2 * len(PLANS) + len(candidates(PLAIN, 80))


@pytest.mark.parametrize("circumstance", ["capturing", "compiling"])
def test_nothing_is_timed_while_a_graph_is_captured_or_traced(monkeypatch, circumstance):
    clock = _clock(HYBRID)
    ours = Tuner(times=True, timer=clock)
    with monkeypatch.context() as patch:
        if circumstance == "capturing":
            patch.setattr(tuner, "_is_capturing", lambda device: True)
        else:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert ours.plan(PLAIN, CPU, clock.run) == FUSED
    # A shape captured with one plan keeps that plan afterwards.
    assert ours.plan(PLAIN, CPU, clock.run) == FUSED
    assert clock.ran == []


def test_a_graph_captured_later_uses_what_was_timed(monkeypatch):
    clock = _clock(HYBRID)
    Tuner(times=True, timer=clock).plan(PLAIN, CPU, clock.run)
    monkeypatch.setattr(tuner, "_is_capturing", lambda device: True)
    assert Tuner(times=True, timer=clock).plan(PLAIN, CPU, clock.run) == HYBRID


def test_a_plan_that_is_no_candidate_any_more_is_not_taken():
    clock = _clock(HYBRID)
    ours = Tuner(times=True, timer=clock)
    ours.plan(PLAIN, CPU, clock.run)
    (file,) = (cache.path for cache in ours._caches.values())
    file.write_text(file.read_text().replace('"plan": "hybrid"', '"plan": "os.system"'))
    assert Tuner(times=True, timer=clock).plan(PLAIN, CPU, clock.run) == HYBRID
    assert len(clock.ran) == 2 * len(PLANS)
    # It is replaced on disk, too: the next process times nothing.
    later = Clock({})
    assert Tuner(times=True, timer=later).plan(PLAIN, CPU, later.run) == HYBRID
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
    clock = _clock(FUSED)

    def run(plan):
        if plan == FUSED:
            raise error
        clock.run(plan)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = Tuner(times=True, timer=clock).plan(PLAIN, CPU, run)
    assert chosen != FUSED
    assert [str(w.message).startswith("lora_fast: fused cannot") for w in caught] == [True] * warns


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

    assert Tuner(times=True, timer=Clock({})).plan(PLAIN, CPU, run) == FUSED
    assert list(tmp_path.glob("*.json")) == []


def test_threads_time_a_query_once():
    clock = _clock(HYBRID)
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
    assert found == [HYBRID] * 8
    assert clock.ran == list(PLANS)


def test_float32_is_left_to_cublas_without_a_clock():
    asked = PLAIN._replace(M=8192, dtype=FP32, weights=(FP32,))
    assert Tuner(times=False).plan(asked, CPU, lambda plan: None) == HYBRID


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True), (None, False)])
def test_the_environment_decides(monkeypatch, value, expected):
    monkeypatch.delenv("LORA_FAST_AUTOTUNE", raising=False)
    if value is not None:
        monkeypatch.setenv("LORA_FAST_AUTOTUNE", value)
    assert tuner._times_by_environment() is expected


def test_other_values_are_refused(monkeypatch):
    monkeypatch.setenv("LORA_FAST_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="LORA_FAST_AUTOTUNE must be 0 or 1, got 'yes'"):
        tuner._times_by_environment()
