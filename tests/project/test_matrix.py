"""The matrix of versions covers what pyproject.toml claims, and a row that fails is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pins import PINS

from tests import matrix


def test_every_lower_bound_is_the_pin_of_a_row() -> None:
    rows = {row.name: row for row in matrix.rows()}
    library = matrix.lower_bounds(*matrix.LIBRARY, "trl")
    expected = {"torch", "triton", "bitsandbytes", "numpy", "peft", "transformers", "trl"}
    assert set(library) == expected
    found = {**rows["oldest"].pins, "trl": rows["llama-factory"].pins["trl"]}
    triton = f"triton-{library['triton']}"
    assert found | rows[triton].pins == library
    commands = matrix.lower_bounds("train", base=False)
    assert {"typer", "rich", "peft", "transformers"} <= set(commands)
    assert rows["command-line-oldest"].pins == commands


def test_kernels_run_in_one_row_for_each_triton() -> None:
    rows = matrix.rows()
    ran = [(row.pins["triton"], row.name) for row in rows if "compiled" in row.legs]
    assert sorted(ran) == sorted(matrix.TRITONS.items())
    legs = (("default",), matrix.KERNELS, ("default", *matrix.KERNELS))
    assert all(row.legs in legs for row in rows)
    assert min(matrix.TRITONS) == matrix.lower_bounds()["triton"]
    assert PINS["triton"] in matrix.TRITONS


def test_rows_of_what_people_have_do_without_the_command_line() -> None:
    people = ("colab", "llama-factory", "axolotl", "unsloth", "newest", "oldest")
    rows = {row.name: row for row in matrix.rows()}
    for name in people:
        row = rows[name]
        assert row.extra == "test-library" and "default" in row.legs
        assert set(matrix.COMMAND_LINE) <= set(row.without)
        assert ("trl" in row.pins) == ("trl" in row.packages) == ("trl" not in row.without)


def test_a_row_takes_the_python_that_it_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))

    def python(path: str, script: str) -> str:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        return str(file)

    row = matrix.Row("row", {}, ("default",), python="3.99")
    assert matrix.interpreter(row) == sys.executable
    assert "no Python 3.99 here" in capsys.readouterr().out
    python("python3.99", "echo choose one; exit 127")  # as a shim of pyenv
    python("versions/3.99.0/bin/python", "echo 3.9")
    wanted = python("versions/3.99.1/bin/python", "echo 3.99")
    assert matrix.interpreter(row) == wanted
    python("python3.99", "echo 3.99")
    assert matrix.interpreter(row) == "python3.99"
    here = "{}.{}".format(*sys.version_info)
    assert matrix.interpreter(matrix.Row("row", {}, (), python=here)) == sys.executable
    assert matrix.interpreter(matrix.Row("row", {}, ())) == sys.executable


def test_pins_take_the_place_of_those_of_the_suite() -> None:
    row = matrix.Row("row", {"triton": "3.6.0"}, ("default",))
    ours = (matrix.ROOT / "constraints.txt").read_text().splitlines()
    theirs = matrix.constraints(row).splitlines()
    assert [line for line in theirs if line.startswith("triton=")] == ["triton==3.6.0"]
    assert {line for line in ours if not line.startswith("triton==")} == set(theirs) - {
        "triton==3.6.0"
    }


def test_what_a_row_selects_and_adds_reaches_pytest_and_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[Any] = []

    def run(command: Any, **_: Any) -> subprocess.CompletedProcess[bytes]:
        commands.append([str(word) for word in command])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    rows = {row.name: row for row in matrix.rows()}
    for name, added, selected in (
        ("triton-3.5.1", ".[test]", ["-k", "not sm_100"]),
        ("command-line-oldest", ".[test]", []),
        ("unsloth", "trl", [f"--without={module}" for module in matrix.COMMAND_LINE]),
        ("deepspeed", "deepspeed", ["-k", "deepspeed"]),
    ):
        list(matrix.run(rows[name], rows[name].legs, 1, []))
        pip, pytest_run = commands[1], commands[-1]
        assert pip[pip.index("--constraint") - 1] == added
        assert pytest_run[pytest_run.index("--json") + 2 :] == selected
        commands.clear()


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Any] = []
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    row = matrix.Row("row", {"triton": "3.6.0"}, ("default",))
    matrix.install(row)
    made = len(commands)
    matrix.install(row)
    assert len(commands) == made > 0
    matrix.install(matrix.Row("row", {"triton": "3.7.1"}, ("default",)))
    assert len(commands) == 2 * made


def test_rows_are_independent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("broken", "red", "good")
    rows = [matrix.Row(name, {"triton": "3.6.0"}, ("default", "interpreter")) for name in names]

    def install(row: matrix.Row) -> Path:
        if row.name == "broken":
            raise subprocess.CalledProcessError(1, "pip")
        (tmp_path / row.name).mkdir()
        return Path(row.name)

    def run(command: list[Any], **_: Any) -> subprocess.CompletedProcess[bytes]:
        failed = int(command[0] == Path("red"))
        counts = {"passed": 7, "failed": failed, "skipped": 0, "seconds": 1.0}
        Path(command[command.index("--json") + 1]).write_text(json.dumps([counts]))
        return subprocess.CompletedProcess(command, failed)

    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setattr(matrix, "rows", lambda: rows)
    monkeypatch.setattr(matrix, "install", install)
    monkeypatch.setattr(subprocess, "run", run)
    for chosen, status in ((names, 1), (("good",), 0), (("broken",), 1), (("red",), 1)):
        monkeypatch.setattr(sys, "argv", ["matrix.py", "--rows", *chosen, "--discard"])
        assert matrix.main() == status
    every = capsys.readouterr().out.split("\n\n")
    assert any("broken" in part and "NOT INSTALLED" in part and "ok" in part for part in every)
    assert "7 passed, 1 failed, 0 skipped in 1 s" in "".join(every)
