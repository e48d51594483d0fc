"""A missing package skips the units that need it, is reported, and is no failure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from absent_packages import CHECKOUT, environment_without

from bench.gpu_day import absent, commands, report, timing
from bench.gpu_day.day import Day, day
from bench.gpu_day.journal import Journal
from bench.gpu_day.run_units import FILE, Unit, run_units
from bench.gpu_day.runner import is_done, summary
from bench.gpu_day.steps import Step

STEP = Step("training", "", 60, 60, "")


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names that are absent until they are removed."""
    names = {"bitsandbytes"}
    real = absent.is_there
    monkeypatch.setattr(absent, "is_there", lambda name: name not in names and real(name))
    return names


def lacking() -> dict[str, Any]:
    if not absent.is_there("bitsandbytes"):
        raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes.nn")
    return {"summary": "there"}


def failing() -> dict[str, Any]:
    raise ImportError("cannot import name 'Params4bit' from 'bitsandbytes'", name="bitsandbytes")


def typing_wrongly() -> dict[str, Any]:
    raise ModuleNotFoundError("No module named 'bitsandbites'", name="bitsandbites")


def test_a_unit_without_its_package_has_no_result_until_it_is_there(
    tmp_path: Path, hidden: set[str]
) -> None:
    journal, units = Journal(tmp_path / FILE), [Unit("a", lacking), Unit("b", lambda: {})]
    journal.append("call", name="toy", capability=[9, 0], rehearsal=False)
    assert run_units(STEP, units, journal) == 0
    journal.append("finished", step=STEP.name)
    found = journal.step(STEP.name)
    assert found.lacking == {"a": "bitsandbytes"}
    assert found.done and found.refuted == [] and is_done(found)
    assert summary(found) == (
        "1 of 2 units have a result; 1 not, since bitsandbytes is not installed"
    )
    results = report.collected(journal)
    assert list(results["steps"][STEP.name]["rows"]) == ["b"]
    assert "| finished, 1 without bitsandbytes |" in report.text(results, report.Modelled(None))

    assert run_units(STEP, units, journal) == 0
    assert journal.step(STEP.name).started == 2
    hidden.clear()
    assert not is_done(journal.step(STEP.name))
    assert run_units(STEP, units, journal) == 0
    assert journal.step(STEP.name).lacking == {} and journal.step(STEP.name).started == 3


@pytest.mark.parametrize("run", [failing, typing_wrongly])
def test_an_import_that_fails_is_broken(run: Any, tmp_path: Path) -> None:
    journal = Journal(tmp_path / FILE)
    run_units(STEP, [Unit("a", run)], journal)
    assert list(journal.step(STEP.name).broken) == ["a"]


def test_a_package_there_that_lacks_another_is_named_by_the_other(hidden: set[str]) -> None:
    assert absent.named_by(ModuleNotFoundError("…", name="bitsandbytes")) == "bitsandbytes"
    assert absent.named_by(ModuleNotFoundError("…", name="peft")) is None
    assert absent.named_by(ValueError("bitsandbytes")) is None


def test_ours_and_the_floor_raise_what_others_are_left_out_for(hidden: set[str]) -> None:
    def needs_it() -> Any:
        raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")

    with day(rehearse=True) as today:
        row = timing.contest(
            today, {"frozen": lambda: list, "bitsandbytes": needs_it}, baseline="frozen"
        )
        assert row["ok"] and "failed" in row["contestants"]["bitsandbytes"]
        for makers in ({"frozen": needs_it}, {"frozen": lambda: list, "lora_fast": needs_it}):
            with pytest.raises(ModuleNotFoundError):
                timing.contest(today, makers, baseline="frozen")


def test_a_run_without_bitsandbytes_is_dense(
    hidden: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, ...]] = []

    def answered(command: tuple[str, ...], **env: str) -> subprocess.CompletedProcess[str]:
        called.append(command)
        out = Path(command[command.index("--out") + 1])
        out.mkdir()
        (out / "metrics.json").write_text("{}")
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(commands, "_run", answered)
    with day(rehearse=True) as today:
        (unit,) = commands.training(today)
        assert unit.run()["summary"] == "2 steps, dense: bitsandbytes is not installed"
        hidden.clear()
        assert unit.run()["summary"] == "2 steps"
        hidden.add("typer")
        with pytest.raises(absent.Absent, match="typer is not installed"):
            unit.run()
    quantised = [command[command.index("--quantize") + 1] for command in called]
    assert quantised == ["none", "nf4"]


LISTED = """
tests/kernels/test_workspace.py::test_a
tests/kernels/test_workspace.py::test_b
ERROR tests/test_nf4.py
E   ModuleNotFoundError: No module named '{}'
"""


def test_files_of_the_suite_that_need_it_are_left_out(
    hidden: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def listing(package: str) -> None:
        done = subprocess.CompletedProcess((), 2, stdout=LISTED.format(package))
        monkeypatch.setattr(commands, "_run", lambda command, **env: done)

    on_a_gpu = Day(torch.device("cpu"), 90, rehearsal=False)
    listing("bitsandbytes")
    names = [unit.name for unit in commands.gpu_tests(on_a_gpu)]
    assert names == ["tests/kernels/test_workspace.py", "files that import bitsandbytes"]
    with pytest.raises(absent.Absent):
        commands.gpu_tests(on_a_gpu)[1].run()
    # What cannot be imported for another reason is run, and fails.
    listing("accuracy")
    names = [unit.name for unit in commands.gpu_tests(on_a_gpu)]
    assert names == ["tests/kernels/test_workspace.py", "tests/test_nf4.py"]


def test_tests_that_fail_since_it_is_absent_are_counted_apart(
    hidden: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "FAILED tests/a.py::b - lora_fast.optional_packages.MissingPackageError: an NF4 weight "
        "needs bitsandbytes, which is not installed: pip install",
        "FAILED tests/a.py::c - ModuleNotFoundError: No module named 'bitsandbytes'",
    ]

    def answered(command: tuple[str, ...], **env: str) -> subprocess.CompletedProcess[str]:
        counts = [{"passed": 5, "failed": len(lines), "skipped": 1}]
        Path(command[command.index("--json") + 1]).write_text(json.dumps(counts))
        return subprocess.CompletedProcess(command, 1, stdout="\n".join(lines))

    monkeypatch.setattr(commands, "_run", answered)
    with day(rehearse=True) as today:
        (unit,) = commands.gpu_tests(today)
        found = unit.run()
        assert found["ok"] and found["failures"] == []
        assert found["summary"] == "5 passed, 0 failed, 1 skipped, 2 without bitsandbytes"
        lines.append("FAILED tests/a.py::d - AssertionError")
        found = unit.run()
        assert not found["ok"] and found["failures"] == lines[2:]
        hidden.add("hypothesis")
        with pytest.raises(absent.Absent, match="hypothesis"):
            unit.run()


def test_what_is_measured_needs_neither_a_command_line_nor_a_test_runner(tmp_path: Path) -> None:
    """No pictures either; the steps that need them say so, and the call does not fail."""
    hidden = ("bitsandbytes", "pytest", "hypothesis", "typer", "rich", "matplotlib", "sklearn")
    steps = [f"--only={name}" for name in ("tests", "accuracy", "linears", "training")]
    command = [sys.executable, "-m", "bench.gpu_day", "--rehearse", "--out", tmp_path / "out"]
    done = subprocess.run(
        [*command, *steps], cwd=CHECKOUT, env=environment_without(*hidden), capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BROKEN" not in done.stdout and "FAILED" not in done.stdout
    found = Journal(tmp_path / "out" / FILE).progress()
    lacking = {name: set(step.lacking.values()) for name, step in found.items()}
    assert lacking == {
        "tests": {"pytest"},
        "accuracy": {"bitsandbytes"},
        "linears": {"bitsandbytes"},
        "training": {"typer"},
    }
    for name in ("accuracy", "linears"):
        results = found[name].rows.keys() - found[name].lacking.keys()
        assert results and all(unit.startswith("dense") for unit in results)
    assert "no pictures: matplotlib is not installed" in done.stdout
    assert "without bitsandbytes" in (tmp_path / "out" / "report.md").read_text()
