"""Steps that crash, hang, fail or are interrupted lose no more than they must."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bench.gpu_day import __main__ as command_line
from bench.gpu_day.journal import Journal
from bench.gpu_day.run_units import Unit, run_units
from bench.gpu_day.runner import NEW_PROCESS, Runner
from bench.gpu_day.steps import STEPS, Step

ROOT = Path(__file__).resolve().parents[3]

# A step's process: units by name, each leaving an x in the file of its name before it misbehaves.
PROCESS = """
    import os, signal, sys, time
    from pathlib import Path
    from bench.gpu_day.journal import Journal
    from bench.gpu_day.run_units import Unit, end_with_parent, run_units
    from bench.gpu_day.steps import Step

    folder, names = Path(sys.argv[1]), sys.argv[2:]

    def run(name):
        with open(folder / name, "a") as mark:
            mark.write("x")
        kind = name.rstrip("0123456789")
        if kind == "hangs":
            time.sleep(60)
        if kind == "slow":
            time.sleep(0.4)
        if kind == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == "raises":
            raise ValueError("what is wrong")
        if kind == "exits":
            os._exit(3)
        return {"ok": kind != "refutes", "new_process": kind == "taints"}

    if names == ["broken step"]:
        sys.exit("no units can be made")
    end_with_parent()
    units = [Unit(name, lambda name=name: run(name)) for name in names]
    sys.exit(run_units(Step("toy", "", 60, 60, ""), units, Journal(folder / "journal.jsonl")))
"""


@pytest.fixture
def process(tmp_path: Path) -> Path:
    path = tmp_path / "process.py"
    path.write_text(textwrap.dedent(PROCESS))
    return path


def runner(process: Path, units: dict[str, list[str]]) -> Runner:
    """Runs PROCESS with ``units`` of each step. All steps share the name toy in its journal."""
    folder = process.parent

    def command(step: Step) -> list[str]:
        code = process.read_text().replace('"toy"', repr(step.name))
        return [sys.executable, "-c", code, str(folder), *units[step.name]]

    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return Runner(
        Journal(folder / "journal.jsonl"), command, folder / "log.txt", ROOT, env, least_seconds=0.5
    )


def steps(*names: str, limit: float = 60, unit_limit: float = 60) -> list[Step]:
    return [Step(name, "", limit, unit_limit, "") for name in names]


def marks(folder: Path, unit: str) -> int:
    return len((folder / unit).read_text()) if (folder / unit).is_file() else 0


def test_every_kind_of_failure_costs_its_own_unit_alone(
    process: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["good1", "crashes", "raises", "exits", "refutes", "taints", "good2"]
    both = runner(process, {"first": names, "second": ["good3"]})
    both.run(steps("first", "second"), None)
    found = both.journal.step("first")
    assert found.broken == {
        "crashes": f"killed by signal {int(signal.SIGSEGV)}",
        "raises": "ValueError: what is wrong",
        "exits": "exit status 3",
    }
    assert list(found.rows) == ["good1", "refutes", "taints", "good2"]
    assert found.refuted == ["refutes"]
    assert found.finished and not found.done
    assert both.journal.step("second").done
    assert "raises: BROKEN: ValueError: what is wrong" in capsys.readouterr().out
    assert {marks(process.parent, name) for name in names} == {1}

    # The next call retries a broken unit, but not one that has a result.
    both.journal.append("call")
    both.run(steps("first", "second"), None)
    assert {marks(process.parent, name) for name in found.rows} == {1}
    assert {marks(process.parent, name) for name in found.broken} == {2}


def test_a_unit_over_its_limit_is_ended_and_the_others_run(process: Path) -> None:
    one = runner(process, {"toy": ["good1", "hangs", "good2"]})
    started = time.monotonic()
    one.run(steps("toy", unit_limit=1.5), None)
    found = one.journal.step("toy")
    assert found.broken == {"hangs": "not done after 2 s"}
    assert list(found.rows) == ["good1", "good2"]
    assert time.monotonic() - started < 30


def test_a_step_over_its_limit_is_recorded_and_the_next_one_runs(process: Path) -> None:
    both = runner(process, {"long": ["good1", "hangs", "good2"], "next": ["good3"]})
    both.run([*steps("long", limit=2), *steps("next")], None)
    long = both.journal.step("long")
    assert long.stopped == "not done after 2 s" and not long.finished
    assert list(long.rows) == ["good1"] and long.broken == {}
    assert both.journal.step("next").done


def test_the_budget_cuts_off_without_blame_and_the_next_call_goes_on(
    process: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"slow{number}" for number in range(12)]
    both = runner(process, {"first": names, "second": ["good"]})
    both.journal.append("call")
    started = time.monotonic()
    both.run(steps("first", "second"), budget=2.0)
    assert time.monotonic() - started < 10
    assert "no time left" in capsys.readouterr().out
    cut = both.journal.step("first")
    assert 0 < len(cut.rows) < len(names)
    assert cut.stopped is None and cut.broken == {} and not cut.finished

    both.journal.append("call")
    both.run(steps("first", "second"), None)
    assert both.journal.step("first").done and both.journal.step("second").done
    assert all(marks(process.parent, name) == 1 for name in cut.rows)


def test_a_step_that_cannot_make_its_units_stops_alone(
    process: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = runner(process, {"first": ["broken step"], "second": ["good"]})
    both.run(steps("first", "second"), None)
    assert both.journal.step("first").stopped == "exit status 1"
    assert both.journal.step("second").done
    assert "no units can be made" in capsys.readouterr().out


def test_killed_between_units_it_resumes_where_it_stopped(process: Path) -> None:
    """The whole command is killed, without a word; its step's process does not outlive it."""
    folder = process.parent
    names = ["good1", "slow1", "hangs", "good2"]
    script = f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "support")!r}]
        from pathlib import Path
        from tests.bench.gpu_day.test_day import runner, steps
        runner(Path({str(process)!r}), {{"toy": {names}}}).run(steps("toy"), None)
    """
    command = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    deadline = time.monotonic() + 60
    while marks(folder, "hangs") == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    command.kill()
    command.wait()
    with open(folder / "journal.jsonl", "ab") as journal:
        journal.write(b'{"event": "row", "st')  # an interrupted write
    (folder / "hangs").unlink()

    one = runner(process, {"toy": [name if name != "hangs" else "good3" for name in names]})
    one.journal.append("call")
    one.run(steps("toy"), None)
    assert one.journal.step("toy").done
    assert [marks(folder, name) for name in ("good1", "slow1", "good2", "good3")] == [1] * 4
    assert not (folder / "hangs").exists()
    assert not [path for path in Path("/proc").glob("[0-9]*") if str(folder) in arguments_of(path)]


def arguments_of(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:  # it has ended meanwhile
        return ""


def test_forgotten_steps_run_again(process: Path) -> None:
    one = runner(process, {"toy": ["good"]})
    one.run(steps("toy"), None)
    one.run(steps("toy"), None)
    assert marks(process.parent, "good") == 1
    one.journal.append("forget", step="toy")
    one.run(steps("toy"), None)
    assert marks(process.parent, "good") == 2


def test_after_a_unit_that_taints_its_process_another_goes_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    units = [
        Unit("taints", lambda: {"new_process": True}),
        Unit("clean", lambda: {}),
    ]
    (step,) = steps("toy")
    assert run_units(step, units, journal) == NEW_PROCESS
    assert list(journal.step("toy").rows) == ["taints"]
    assert run_units(step, units, journal) == 0
    assert list(journal.step("toy").rows) == ["taints", "clean"]


def call(monkeypatch: pytest.MonkeyPatch, process: Path, *arguments: str) -> int:
    """The command with toy steps on a device of this name."""
    units = {"first": ["good1", "refutes"], "second": ["good2"]}
    toy = runner(process, units)
    about = {"name": "Toy GPU", "capability": [9, 0]}
    monkeypatch.setattr(command_line, "STEPS", steps("first", "second"))
    monkeypatch.setattr(command_line, "_about", lambda rehearse, env: about)
    monkeypatch.setattr(command_line, "_command", lambda out, rehearse: toy.command)
    monkeypatch.setattr(command_line, "_report", lambda out, env: True)
    monkeypatch.setattr(command_line, "FILE", "journal.jsonl")
    return command_line.main(["--out", str(process.parent), *arguments])


def test_a_failing_step_fails_the_command_and_stops_nothing(
    process: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, process) == 1
    assert "failed: first: 2 of 2 units have a result; 1 FAILED: refutes" in capsys.readouterr().out
    assert marks(process.parent, "good2") == 1
    assert call(monkeypatch, process, "--only", "second") == 0
    assert marks(process.parent, "good2") == 1
    assert call(monkeypatch, process, "--only", "second", "--fresh") == 0
    assert marks(process.parent, "good2") == 2


def test_what_did_not_fit_is_left_and_no_failure(
    process: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, process, "--budget", "0.1") == 0
    assert "left: first" in capsys.readouterr().out


def test_the_budget_includes_the_report(process: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever lends a machine for that long ends what still runs."""
    budgets: list[float | None] = []
    monkeypatch.setattr(Runner, "run", lambda self, steps, budget: budgets.append(budget))
    call(monkeypatch, process, "--budget", "60")
    call(monkeypatch, process)
    assert budgets[1] is None
    assert budgets[0] is not None and 40.0 < budgets[0] <= 60.0 - command_line._REPORT_SECONDS


def test_results_of_another_device_or_of_a_rehearsal_are_not_mixed(
    process: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, process, "--only", "second")
    assert call(monkeypatch, process, "--only", "second", "--rehearse") == 2
    assert "holds results of Toy GPU" in capsys.readouterr().err


def test_without_a_gpu_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench.gpu_day"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("make gpu needs a CUDA device") and "--rehearse" in line


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "_NEEDED", ("json", "no_such_package"))
    assert command_line.main(["--rehearse"]) == 2
    assert "the packages no_such_package" in capsys.readouterr().err


def test_folder_is_named_after_the_device() -> None:
    assert command_line.folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_orchestration_does_not_import_torch() -> None:
    """A driver that hangs must not hang the command that watches over it."""
    code = (
        "import sys, bench.gpu_day.__main__ as m; m.main(['--list']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert len(done.stdout.splitlines()) == len(STEPS) + 1


def test_the_journal_is_one_json_object_a_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("row", step="a", unit="b", seconds=1.0, row={"x": 1})
    (line,) = journal.path.read_text().splitlines()
    assert json.loads(line)["row"] == {"x": 1}
