"""``lora-fast plan``: output, exit codes, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import run_cli, save_llama

from lora_fast.cli import console, plan


def test_the_command_says_what_fits_and_what_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_llama(tmp_path)
    shape = ("--batch-size", 2, "--max-length", 24)
    assert run_cli("plan", tmp_path, *shape, "--card", "rtx4090") == 0
    shown = capsys.readouterr().out
    assert "fits on rtx4090" in shown and "helps most:" in shown and "activations" in shown
    assert run_cli("plan", tmp_path / "config.json", *shape, "--memory", "1GB", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False and found["memory"] == 10**9
    assert found["total"] == sum(found["parts"].values())
    assert run_cli("plan", tmp_path, *shape) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "fits on: t4 (with --dtype float16, without the kernels), rtx3090, " in shown


@pytest.mark.parametrize(
    "options",
    [
        ("absent/no", "--method", "full", "--quantize", "nf4"),
        ("./absent",),
        ("x", "--card", "voodoo2"),
        ("x", "--card", "h100", "--memory", "1GB"),
    ],
)
def test_the_command_tells_what_is_wrong_in_one_line(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("plan", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_what_takes_longer_than_two_seconds_says_so_in_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((0.0, 1.9, 2.1, 9.0))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.Working() as working:
        for stage in ("Reading", "Counting", "Trying", "More"):
            working.told(stage)
    shown = capsys.readouterr()
    assert shown.err.split() == ["Trying", "…", "More", "…"] and shown.out == ""


def test_parts_too_small_to_see_have_no_row_() -> None:
    parts = {"weights": 10**13, "rope": 512, "adapters": 10**9}
    assert plan.visible(parts) == {"weights": 10**13, "adapters": 10**9}
    assert plan.visible({"weights": 1000, "rope": 512}) == {"weights": 1000, "rope": 512}
