"""The runner of the suite reports every leg, and calls nothing green that is not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import run

SUITE = """
import os
import pytest

def test_passes():
    assert not {"TRITON_INTERPRET", "PYTHONDONTWRITEBYTECODE"} & os.environ.keys()

@pytest.mark.broken
def test_fails():
    assert False

@pytest.mark.broken
def test_passes_too():
    pass

@pytest.mark.broken
def test_is_skipped():
    pytest.skip("on purpose")
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small tree with tests, in the place of this one."""
    (tmp_path / "test_small.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n  broken: fails\n  absent: no test\n"
    )
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    # Most of the time would go into plugins that these few tests do not use.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "xdist.plugin,pytest_timeout")
    return tmp_path


def run_main(
    legs: list[run.Leg], report: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, list[tuple[str, int, int, int]]]:
    monkeypatch.setattr(run, "cpu_legs", lambda: legs)
    monkeypatch.setattr(sys, "argv", ["run.py", "--jobs", "1", "--json", str(report), *arguments])
    code = run.main()
    counts = [
        (o["leg"]["name"], o["passed"], o["failed"], o["skipped"])
        for o in json.loads(report.read_text())
    ]
    return code, counts


def test_a_failing_leg_fails_the_run_but_every_leg_runs(
    suite: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    legs = [run.Leg("bad", "broken"), run.Leg("none", "absent"), run.Leg("good", "not broken")]
    code, counts = run_main(legs, suite / "report.json", monkeypatch)
    assert code == 1
    assert counts == [("bad", 1, 1, 1), ("none", 0, 1, 0), ("good", 1, 0, 0)]
    assert capfd.readouterr().out.splitlines()[-1] == "2 passed, 2 failed, 1 skipped"


def test_a_leg_that_dies_is_a_failure(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (suite / "conftest.py").write_text("raise SystemExit(7)")
    legs = [run.Leg("good", "not broken")]
    assert run_main(legs, suite / "report.json", monkeypatch) == (1, [("good", 0, 1, 0)])


def test_green_is_green_and_a_leg_can_be_chosen(
    suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    legs = [run.Leg("default", "not broken"), run.Leg("interpreter", "broken")]
    arguments = ("--leg", "default", "-k", "passes")
    code, counts = run_main(legs, suite / "report.json", monkeypatch, *arguments)
    assert (code, counts) == (0, [("default", 1, 0, 0)])


def test_the_legs_leave_no_test_out() -> None:
    """Whatever markers a test has, at least one leg selects it; one alone what is exhaustive.

    conftest.py refuses a test that is exhaustive and interpreted.
    """
    legs = (*run.cpu_legs(), run.EXHAUSTIVE_LEG, run.GPU_LEG)
    markers = ("interpreter", "compiled", "offline", "pretended", "exhaustive", "gpu")
    for chosen in range(2 ** len(markers)):
        marks = {name: bool(chosen >> i & 1) for i, name in enumerate(markers)}
        selecting = [leg.name for leg in legs if eval(leg.select, {}, marks)]
        assert selecting, marks
        if marks["exhaustive"] and not marks["gpu"]:
            assert selecting == ["exhaustive"], marks


def test_a_kind_of_cpu_is_forced_in_every_leg(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (suite / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--cpu-kind')\n"
    )
    test = (
        "def test_kind(pytestconfig):\n    assert pytestconfig.getoption('--cpu-kind') == 'packed'"
    )
    (suite / "test_kind.py").write_text(test)
    legs = [run.Leg(name, "not broken") for name in ("one", "two")]
    arguments = ("--cpu-kind", "packed", "-k", "kind")
    code, counts = run_main(legs, suite / "report.json", monkeypatch, *arguments)
    assert (code, counts) == (0, [("one", 1, 0, 0), ("two", 1, 0, 0)])
