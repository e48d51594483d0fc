"""A resumed run notices changed inputs: other examples, another base model, another folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import (
    AtStep,
    interrupt,
    metrics_of,
    run,
    run_cli,
    save_bert,
    sentiment_rows,
    write_jsonl,
)

from lora_fast.errors import Interrupted
from lora_fast.files.fingerprint import weights_fingerprint
from lora_fast.files.run_files import stored_record
from lora_fast.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("libraries_as_before")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, a whole run and one that was interrupted at step 2."""
    folder = tmp_path_factory.mktemp("begun")
    save_bert(folder / "model")
    write_jsonl(folder / "data.jsonl", sentiment_rows())
    before = Path.cwd()
    os.chdir(folder)
    try:
        config = TrainConfig(
            model="model", data="data.jsonl", steps=4, r=4, quantize="none", save_every=1
        )
        run(config, Path("whole"))
        with pytest.raises(Interrupted):
            run(config, Path("cut"), AtStep("lora_fast", 1, interrupt))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def cut(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the interrupted run, whose inputs are where it began; the current folder is new."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(begun / "cut", tmp_path / "cut"))


def losses(out: Path) -> list[float]:
    return metrics_of(out)["results"]["lora_fast"]["losses"]


def rewire(cut: Path, **paths: Path) -> None:
    """Let the run have had its inputs in other places, where a test may change them."""
    stored = json.loads((cut / "run.json").read_text())
    stored |= {name: str(path) for name, path in paths.items()}
    (cut / "run.json").write_text(json.dumps(stored))


def test_a_run_goes_on_from_any_folder(begun: Path, cut: Path) -> None:
    assert run_cli("train", "--resume", "--out", cut) == 0
    assert losses(cut) == losses(begun / "whole")
    stored = json.loads((cut / "run.json").read_text())
    assert stored["data"] == str(begun / "data.jsonl") and stored["model"] == str(begun / "model")
    adapter = json.loads((cut / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(begun / "model")
    assert f"base_model: {begun / 'model'}" in (cut / "README.md").read_text()
    assert metrics_of(cut)["resumed"] == []


def test_inputs_may_move(begun: Path, cut: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(begun / "model", tmp_path / "elsewhere"))
    text = (begun / "data.jsonl").read_text()
    (tmp_path / "same.jsonl").write_text(text.replace("\n", "\r\n") + "\r\n")
    inputs = ("--data", "same.jsonl", "--model", "elsewhere")
    assert run_cli("train", "--resume", "--out", cut, *inputs) == 0
    assert losses(cut) == losses(begun / "whole")
    assert metrics_of(cut)["resumed"] == []
    assert metrics_of(cut)["model"] == str(moved)


def changed_data(begun: Path, folder: Path) -> Path:
    return write_jsonl(folder / "other.jsonl", sentiment_rows(60))


def changed_model(begun: Path, folder: Path) -> Path:
    other = Path(shutil.copytree(begun / "model", folder / "other"))
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("query.weight"))
    weights[name] = weights[name] + 0.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return other


CHANGES: dict[str, tuple[Any, str]] = {
    "data": (changed_data, "other examples than when the run began (96 then, 60 now)"),
    "model": (changed_model, "other weights than when the run began"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_inputs_are_refused_until_they_are_asked_for(
    name: str, begun: Path, cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, what = CHANGES[name]
    other = make(begun, tmp_path)
    rewire(cut, **{name: other})
    before = (cut / "run.json").read_bytes()
    assert run_cli("train", "--resume", "--out", cut) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: --{name} {other}: {what}; put the old ones back, or repeat --{name} beside "
        "--resume to continue anyway\n"
    )
    assert (cut / "run.json").read_bytes() == before

    assert run_cli("train", "--resume", "--out", cut, f"--{name}", other) == 0
    assert f"! Continuing with another --{name}: {what}" in " ".join(
        capsys.readouterr().out.split()
    )
    assert metrics_of(cut)["resumed"] == [{"step": 2, "changed": [f"--{name}"]}]
    assert f"Resumed at step 2 with another --{name}." in (cut / "README.md").read_text()
    assert stored_record(cut)["resumed"] == metrics_of(cut)["resumed"]


def test_other_labels_cannot_be_gone_on_with(
    begun: Path, cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "label": row["label"] + 1} for row in sentiment_rows()]
    other = write_jsonl(tmp_path / "labels.jsonl", rows)
    assert run_cli("train", "--resume", "--out", cut, "--data", other) == 2
    assert "its labels are other ones than when the run began: start another run" in (
        capsys.readouterr().err
    )


def test_a_checkpoint_that_is_cut_off_is_named_and_the_one_before_counts(
    begun: Path, cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = cut / "checkpoints" / "lora_fast" / "checkpoint-2" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-40])
    assert run_cli("train", "--resume", "--out", cut) == 0
    shown = capsys.readouterr().out
    assert "! checkpoint-2 is incomplete (optimizer.pt): continuing from step 1" in shown
    assert losses(cut) == losses(begun / "whole")


class TestFingerprint:
    def save(self, folder: Path, **tensors: torch.Tensor) -> Path:
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        return folder

    def test_copies_share_it_whatever_the_shards(self, tmp_path: Path) -> None:
        a, b = torch.arange(1000.0), torch.zeros(3, dtype=torch.bfloat16)
        one = self.save(tmp_path / "one", a=a, b=b)
        two = self.save(tmp_path / "two", a=a)
        save_file({"b": b}, two / "more.safetensors", metadata={"format": "pt"})
        assert weights_fingerprint(one) == weights_fingerprint(two) is not None

    @pytest.mark.parametrize(
        "other",
        [
            {"a": torch.arange(1000.0) + 1},
            {"a": torch.arange(1000.0).view(10, 100)},
            {"b": torch.arange(1000.0)},
            {"a": torch.arange(1000)},
            {"a": torch.arange(1000.0), "b": torch.zeros(0)},
        ],
        ids=["values", "shape", "name", "type", "more"],
    )
    def test_others_do_not(self, tmp_path: Path, other: dict[str, torch.Tensor]) -> None:
        one = self.save(tmp_path / "one", a=torch.arange(1000.0))
        assert weights_fingerprint(one) != weights_fingerprint(self.save(tmp_path / "x", **other))

    @pytest.mark.parametrize("content", [b"", b"\xff" * 9, b"\x02" + bytes(7) + b"[]"])
    def test_what_is_no_safetensors_has_none(self, tmp_path: Path, content: bytes) -> None:
        assert weights_fingerprint(tmp_path) is None
        (tmp_path / "model.safetensors").write_bytes(content)
        assert weights_fingerprint(tmp_path) is None
