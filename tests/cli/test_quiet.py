"""What the libraries below say of themselves does not reach who runs a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import save_llama, sentiment_rows, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
LOUD = ("Failed to load", "MISSING", "FutureWarning", "UserWarning", "newly initialized")


def said(*command: str) -> str:
    """What a command prints in a process of its own, where nothing is silenced yet."""
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


@pytest.mark.parametrize("command", ["plan", "tune", "train"])
def test_a_command_says_nothing_of_others(command: str, tmp_path: Path) -> None:
    model = str(save_llama(tmp_path / "model"))
    arguments = {
        "plan": ["plan", model],
        "tune": ["tune", model, "--dry-run"],
        # The head of a classifier is missing in the checkpoint.
        "train": ["train", "--model", model, "--steps", "1", "--out", str(tmp_path / "out"),
                  "--data", str(write_jsonl(tmp_path / "data.jsonl", sentiment_rows()))],
    }[command]  # fmt: skip
    shown = said(
        "-c", "import sys; from lora_fast.cli.app import main; main(sys.argv[1:])", *arguments
    )
    assert [line for line in shown.splitlines() if any(word in line for word in LOUD)] == []


def test_a_benchmark_says_nothing_of_others() -> None:
    pytest.importorskip("triton")
    shown = said("-c", "import bench, bitsandbytes, transformers; import bitsandbytes.nn")
    assert shown == ""
