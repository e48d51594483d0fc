"""The checkpoint that a run resumes from, however it ended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_fast.training.checkpoints import (
    NEEDED,
    STATE,
    damaged_checkpoints,
    latest_checkpoint,
    latest_step,
)


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in NEEDED:
        if name.endswith(".safetensors"):
            save_file({"x": torch.zeros(100)}, path / name)
        else:
            torch.save({"x": torch.zeros(100)}, path / name)
    (path / STATE).write_text(f'{{"global_step": {step}}}')
    return path


def test_numbers_count_not_names(tmp_path: Path) -> None:
    checkpoint(tmp_path, 9)
    last = checkpoint(tmp_path, 100)
    checkpoint(tmp_path, 20)
    (tmp_path / "checkpoint-last").mkdir()
    (tmp_path / "checkpoint-500").write_text("a file")
    assert latest_checkpoint(tmp_path) == last


@pytest.mark.parametrize("name", [STATE, *NEEDED])
def test_one_that_was_cut_off_does_not_count(tmp_path: Path, name: str) -> None:
    whole = checkpoint(tmp_path, 10)
    (checkpoint(tmp_path, 20) / name).unlink()
    assert latest_checkpoint(tmp_path) == whole


# safetensors have no checksums that would show a hole.
SPOILT = [(name, spoil) for name in NEEDED for spoil in ("cut off", "empty", "noise", "a hole")
          if (spoil != "a hole" or not name.endswith(".safetensors"))]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil"), SPOILT)
def test_one_that_is_spoilt_does_not_count_and_is_named(
    tmp_path: Path, name: str, spoil: str
) -> None:
    """A hole is what is left where the machine went down before the disk had all."""
    whole, spoilt = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20) / name
    assert damaged_checkpoints(tmp_path) == {}
    content = spoilt.read_bytes()
    if spoil == "a hole":
        at = content.index(bytes(400))
        content = content[:at] + b"\1" * 400 + content[at + 400 :]
    spoils = {"cut off": content[:-40], "empty": b"", "noise": b"\xff" * 50}
    spoilt.write_bytes(spoils.get(spoil, content))
    assert latest_checkpoint(tmp_path) == whole
    assert damaged_checkpoints(tmp_path) == {"checkpoint-20": name}


@pytest.mark.parametrize("state", ["", '{"global_step": 2', "[]", "{}"])
def test_a_state_that_was_cut_off_does_not_count(tmp_path: Path, state: str) -> None:
    (checkpoint(tmp_path, 20) / STATE).write_text(state)
    assert latest_checkpoint(tmp_path) is None


def test_nothing_yet(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    assert latest_step(tmp_path) is None


def test_the_last_step_of_any_arm(tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoints" / "stock", 30)
    checkpoint(tmp_path / "checkpoints" / "lora_fast", 10)
    (tmp_path / "checkpoints" / "empty").mkdir()
    assert latest_step(tmp_path) == 30
