"""What decides, and when: the model, the cache or timing."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from lora_fast.kernels.out_of_resources import instead_of
from triton.runtime.errors import OutOfResources
from tuner_clocks import CPU, OTHER, PLANS, Clock, clock_for
from tuner_queries import FP32, PLAIN

from lora_fast.tuning import cost_model, tuner
from lora_fast.tuning.cache import Cache, versions
from lora_fast.tuning.plans import HYBRID
from lora_fast.tuning.tuner import Place, Tuner, _descent


@pytest.fixture(autouse=True)
def _place(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_FAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuner, "place_of", lambda device: Place("H100", 90))


def test_without_timing_the_model_decides_and_no_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "Cache", lambda header: pytest.fail("asked the cache"))
    clock = clock_for(OTHER)
    chosen = Tuner(times=False, timer=clock).plan(PLAIN, CPU, clock.run)
    assert chosen == cost_model.pick(PLAIN, 90) == HYBRID
    assert clock.ran == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fastest", PLANS, ids=[plan.name for plan in PLANS])
def test_each_candidate_is_timed_once_and_the_fastest_kept(fastest):
    clock = clock_for(fastest)
    ours = Tuner(times=True, timer=clock)
    assert [ours.plan(PLAIN, CPU, clock.run) for _ in range(3)] == [fastest] * 3
    assert clock.ran == list(PLANS)
    # Another process finds it on disk.
    later = Clock({})
    assert Tuner(times=True, timer=later).plan(PLAIN, CPU, later.run) == fastest
    assert later.ran == []


def test_another_query_or_device_is_timed_anew(monkeypatch):
    clock = clock_for(OTHER)
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


def test_no_more_device_time_than_the_budget():
    clock = clock_for(PLANS[0])
    clock.seconds = 1.5
    assert Tuner(times=True, timer=clock).plan(PLAIN, CPU, clock.run) == PLANS[0]
    assert clock.left == [2.0, 0.5] and clock.ran == list(PLANS[:2])


def test_a_plan_that_would_exceed_the_budget_is_not_begun():
    clock = clock_for(PLANS[0])
    clock.times = dict.fromkeys(PLANS, 400.0)
    clock.seconds = 0.8
    Tuner(times=True, timer=clock).plan(PLAIN, CPU, clock.run)
    assert clock.left == pytest.approx([2.0, 1.2]) and clock.ran == list(PLANS[:2])


def test_a_timing_of_less_than_a_second_says_nothing(capsys):
    clock = clock_for(OTHER)
    Tuner(times=True, timer=clock).plan(PLAIN, CPU, clock.run)
    assert capsys.readouterr().err == ""


def test_progress_goes_to_a_handler_if_there_is_one(monkeypatch, caplog, capsys):
    monkeypatch.setattr(tuner, "_SILENT_SECONDS", 0.01)
    clock = clock_for(OTHER)
    ran = clock.run
    clock.run = lambda plan: (time.sleep(0.05), ran(plan))
    with caplog.at_level("INFO", logger="lora_fast.tuning"):
        Tuner(times=True, timer=clock).plan(PLAIN, CPU, clock.run)
    (line,) = caplog.messages
    assert line.startswith("lora_fast: timing 3 ways to compute the backward of 4096 → 4096, up to")
    assert capsys.readouterr().err == ""


def test_without_a_handler_progress_goes_to_the_terminal(monkeypatch, capsys):
    """A level alone shows nobody anything."""
    monkeypatch.setattr(tuner.logger, "level", logging.INFO)
    monkeypatch.setattr(tuner.logger, "hasHandlers", lambda: False)
    tuner._say("a line")
    assert capsys.readouterr().err == "a line\n"


def test_a_folder_that_cannot_be_written_leaves_the_choice_to_the_model(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_FAST_CACHE_DIR", str(tmp_path / "file" / "below"))
    clock = clock_for(OTHER)
    ours = Tuner(times=True, timer=clock)
    with pytest.warns(RuntimeWarning, match="nothing is timed") as caught:
        assert ours.plan(PLAIN, CPU, clock.run) == HYBRID
        assert ours.plan(PLAIN._replace(K=2048), CPU, clock.run) == HYBRID
    assert len(caught) == 1 and clock.ran == []


def test_a_file_in_a_folder_that_cannot_be_written_is_read(monkeypatch):
    Cache(versions("H100")).put(PLAIN.key, OTHER.name, {})
    monkeypatch.setattr(Cache, "is_writable", lambda self: False)
    clock = clock_for(HYBRID)
    ours = Tuner(times=True, timer=clock)
    assert ours.plan(PLAIN, CPU, clock.run) == OTHER
    assert ours.plan(PLAIN._replace(K=2048), CPU, clock.run) == HYBRID
    assert clock.ran == []


def test_a_damaged_file_is_timed_anew(tmp_path):
    Cache(versions("H100")).put(PLAIN.key, OTHER.name, {})
    (file,) = tmp_path.glob("*.json")
    file.write_text(file.read_text()[:-20])
    clock = clock_for(OTHER)
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert Tuner(times=True, timer=clock).plan(PLAIN, CPU, clock.run) == OTHER
    assert clock.ran == list(PLANS)


def test_a_file_of_an_older_version_is_left_alone(tmp_path):
    older = {name: value for name, value in versions("H100").items() if name != "format"}
    Cache(older).put(PLAIN.key, "composed", {"composed": 1.0})
    (file,) = tmp_path.glob("*.json")
    before = file.read_text()
    clock = clock_for(OTHER)
    assert Tuner(times=True, timer=clock).plan(PLAIN, CPU, clock.run) == OTHER
    assert clock.ran == list(PLANS)
    assert file.read_text() == before and len(list(tmp_path.glob("*.json"))) == 2


def test_a_plan_that_is_no_candidate_any_more_is_not_taken():
    clock = clock_for(OTHER)
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
    clock = clock_for(HYBRID)

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
    clock = clock_for(OTHER)
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


def test_float32_is_left_to_cublas_without_aclock_for():
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
