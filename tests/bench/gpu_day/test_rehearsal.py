"""Every step of the GPU day, run here: tiny, with stand-ins for torch.cuda and other programs."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_fast.kernels import nf4_decode
from triton.runtime.driver import driver as triton_driver

import lora_fast
from bench import decoder_layer
from bench.gpu_day import (
    accuracy,
    commands,
    decoder_layers,
    linears,
    plans,
    report,
    stand_in,
    tables,
)
from bench.gpu_day.day import Day, day
from bench.gpu_day.journal import Journal
from bench.gpu_day.run_units import FILE, run
from bench.gpu_day.runner import NEW_PROCESS
from bench.gpu_day.steps import STEPS, STUB_ARCH, Step

CPU = torch.device("cpu")
ABOUT = {"name": "no GPU", "capability": [9, 0], "rehearsal": True}


def answered(command: tuple[str, ...], **env: str) -> subprocess.CompletedProcess[str]:
    """Replaces slow programs: writes what the real ones write."""
    if "--json" in command:
        counts = [{"passed": 2, "failed": 0, "skipped": 1}]
        Path(command[command.index("--json") + 1]).write_text(json.dumps(counts))
    if "--compare" in command:
        out = Path(command[command.index("--out") + 1])
        out.mkdir()
        (out / "metrics.json").write_text('{"loss": 1.0}')
    return subprocess.CompletedProcess(command, 0, stdout="")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a rehearsal in this process.

    Fast: the torch backend instead of the interpreter, no torch.compile, no other programs.
    """
    out = tmp_path_factory.mktemp("day")
    Journal(out / FILE).append("call", **ABOUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "_run", answered)
        patch.setattr(torch, "compile", lambda model, *, backend: model)
        for step in STEPS:
            while (status := run(step, out, rehearse=True)) == NEW_PROCESS:
                pass
            assert status == 0
            Journal(out / FILE).append("finished", step=step.name)
    report.write(out)
    return out


def test_every_step_runs_and_every_unit_has_a_result(folder: Path) -> None:
    progress = Journal(folder / FILE).progress()
    assert list(progress) == [step.name for step in STEPS]
    for name, step in progress.items():
        assert step.done and list(step.rows) == step.units != [], name
        assert step.refuted == [], (name, step.rows)


def test_every_contestant_is_timed_in_both_modes(folder: Path) -> None:
    contested = set()
    for name, step in Journal(folder / FILE).progress().items():
        for unit, event in step.rows.items():
            for who, found in event["row"].get("contestants", {}).items():
                assert found["eager"]["seconds"]["median"] == stand_in.MILLISECONDS / 1e3
                assert found["graph"]["over_baseline"]["median"] == 1.0, (unit, who)
                assert found["peak_bytes"] == 0
                contested.add((name, who))
    for name in ("layers", "shorter_layers"):
        assert {(name, who) for who in decoder_layer.CONTESTANTS} <= contested
    assert ("layers", "peft compiled") in contested
    assert {("layers", "lora_fast fused"), ("crossover", "in the product")} <= contested


def test_every_output_says_that_it_is_a_rehearsal(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert "NOT A MEASUREMENT" in results["note"]
    text = (folder / "report.md").read_text()
    sections = text.split("\n## ")
    assert len(sections) > 8
    assert all("NOT A MEASUREMENT" in section for section in sections[:-1])
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {"layers.png", "linears-dense.png", "linears-nf4.png", "crossover.png"}
    assert {path.name for path in folder.iterdir()} - pictures == {
        "journal.jsonl",
        "report.md",
        "results.json",
    }


def test_report_has_a_line_for_every_contestant(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    for event in Journal(folder / FILE).events():
        for who in event.get("row", {}).get("contestants", {}):
            if event["step"] == "candidates":
                assert f"| {event['unit']} | {who} | 1.0000 |" in text
            elif event["step"] != "crossover":
                assert f"| {event['unit']} | {who} |" in text
    assert "| nf4 bfloat16 M8 K64 N64 R16 forward | 1.0000 | 1.0000 |" in text


def test_a_call_that_got_nowhere_has_a_report(tmp_path: Path) -> None:
    journal = Journal(tmp_path / FILE)
    journal.append("call", **ABOUT)
    journal.append("units", step="layers", units=["a", "b"])
    journal.append("start", step="layers", unit="a")
    journal.append("broken", step="layers", unit="a", reason="killed by signal 11")
    journal.append("stopped", step="tests", reason="exit status 1")
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| layers | 0 of 2 | 0 | 1 | 0 | not finished |" in text
    assert "- layers, a: killed by signal 11" in text and "- tests: exit status 1" in text


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_units_of_a_real_day_have_names_of_their_own(
    step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal knows a unit by its name; nothing is measured or allocated before it runs."""
    monkeypatch.setattr(
        commands, "_files_with_gpu_tests", lambda: (["tests/kernels/test_kernels.py"], [])
    )
    module, function = step.source.split(":")
    make = getattr(importlib.import_module(f"bench.gpu_day.{module}"), function)
    names = [unit.name for unit in make(Day(torch.device("cuda", 0), 90, rehearsal=False))]
    assert names and len(set(names)) == len(names)


def test_the_most_valuable_layers_come_first() -> None:
    today = Day(torch.device("cuda", 0), 90, rehearsal=False)
    first, second, *_ = (unit.name for unit in decoder_layers.long(today))
    assert first == "Llama-3-8B dense M8192 R16 p0" and second == "Llama-3-8B nf4 M8192 R16 p0"


@pytest.mark.interpreter
def test_kernels_run_in_a_rehearsal() -> None:
    """With TRITON_INTERPRET=1, as the command sets it, kernels compute what is not timed."""
    launched: list[Any] = []
    with day(rehearse=True) as today, pytest.MonkeyPatch.context() as patch:
        assert lora_fast.backends.choice.get_backend() == today.fused == "triton"
        decode = nf4_decode.decode
        patch.setattr(nf4_decode, "decode", lambda *args: launched.append(args) or decode(*args))
        rows = [unit.run() for unit in (*linears.crossover(today)[:1], *plans.units(today)[-1:])]
    for row in rows:
        assert row["ok"], row
        assert all("graph" in found for found in row["contestants"].values())
    crossover, backward = rows
    assert {"workspace", "in the product", "bitsandbytes"} <= crossover["contestants"].keys()
    assert list(backward["contestants"]) == ["fused in-gemm", "fused workspace", "hybrid"]
    assert backward["picked"] in backward["contestants"]
    assert launched  # by the route with a workspace, which fused layers of so few rows do not take


@pytest.mark.offline
def test_kernels_are_compiled_in_a_rehearsal_for_an_architecture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(STUB_ARCH, "89")
    with day(rehearse=True) as today:
        assert (today.arch, today.fused, today.computes) == (89, "triton", False)
        rows = [unit.run() for unit in (*accuracy.units(today)[:2], *linears.crossover(today)[:1])]
        log = triton_driver.active.log
    assert all(row["ok"] for row in rows)
    assert "compiled" not in tables.accuracy({"case": rows[0]})  # no error was found out
    assert {"ticketed_gemm", "strips", "nf4_decode"} <= set(log.names)
    assert log.target.arch == 89
