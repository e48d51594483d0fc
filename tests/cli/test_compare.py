"""``lora-fast compare`` and ``--method``: output, exit codes, one-line errors."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from tiny_runs import (
    metrics_of,
    run_cli,
    save_bert,
    save_llama,
    sentiment_rows,
    write_jsonl,
)

from lora_fast.cli.console import Terminal
from lora_fast.methods.table import METHODS
from lora_fast.training import comparison

pytestmark = pytest.mark.usefixtures("libraries_as_before")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_bert(folder / "bert")
    write_jsonl(folder / "data.jsonl", sentiment_rows())
    return folder


@pytest.fixture
def tiny(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of short runs on the tiny model, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    options = {"model": folder / "bert", "data": folder / "data.jsonl", "steps": 2}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def test_a_comparison_shows_its_table_and_where_it_is(
    capsys: pytest.CaptureFixture[str], tiny: list[str]
) -> None:
    assert run_cli("compare", *tiny, "--methods", "rslora,probe", "--out", "out") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for text in (
        "rsLoRA", "linear probe", "13 of 13", "ROC AUC", "step: time of one step", "majority class",
        "Training with rsLoRA (1 of 2)", "2 steps of 32 examples, seed 0", "compare.png: out",
    ):  # fmt: skip
        assert text in shown.out, text
    assert list(json.loads(Path("out/compare.json").read_text())["methods"]) == ["rslora", "probe"]


def test_a_failed_method_gives_an_exit_code(
    capsys: pytest.CaptureFixture[str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(comparison, "train_arm", fails)
    assert run_cli("compare", *tiny, "--methods", "probe", "--out", "out") == 1
    assert "linear probe failed: RuntimeError: broken" in capsys.readouterr().out


def test_a_method_that_cannot_apply_is_a_row_and_no_failure(
    capsys: pytest.CaptureFixture[str], tiny: list[str], tmp_path: Path
) -> None:
    save_llama(tmp_path / "llama")  # has no biases
    options = [*tiny, "--model", str(tmp_path / "llama"), "--quantize", "none"]
    assert run_cli("compare", *options, "--methods", "bitfit,probe", "--out", "out") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "BitFit does not apply: --method bitfit: the model must have biases" in shown
    rows = json.loads(Path("out/compare.json").read_text())["methods"]
    assert list(rows["bitfit"]) == ["title", "not_applicable"]
    assert "| BitFit | does not apply: --method bitfit" in Path("out/compare.md").read_text()
    assert run_cli("compare", *options, "--methods", "bitfit", "--out", "alone") == 1


def test_ctrl_c_says_what_is_kept(
    capsys: pytest.CaptureFixture[str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Terminal.step

    def interrupted(self: Terminal, number: int, *numbers: float) -> None:
        step(self, number, *numbers)
        if "2 of 2" in self._stage:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Terminal, "step", interrupted)
    assert run_cli("compare", *tiny, "--methods", "probe,layernorm", "--out", "out") == 130
    error = capsys.readouterr().err
    assert error == "interrupted; out/compare.json and the table beside it have the 1 finished\n"


def test_a_comparison_is_replaced_on_request_only(
    capsys: pytest.CaptureFixture[str], tiny: list[str]
) -> None:
    arguments = ["compare", *tiny, "--methods", "probe", "--out", "out"]
    assert run_cli(*arguments) == 0
    capsys.readouterr()
    assert run_cli(*arguments) == 2
    assert "out already holds a comparison" in capsys.readouterr().err
    Path("out/notes.txt").write_text("mine")
    assert run_cli(*arguments, "--overwrite") == 0
    assert Path("out/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_not_touched(
    capsys: pytest.CaptureFixture[str], tiny: list[str], overwrite: bool
) -> None:
    Path("out/.work").mkdir(parents=True)
    for name in ("compare.md", ".work/mine", "compare.json"):
        Path("out", name).write_text("{}")
    arguments = ["compare", *tiny, "--methods", "probe", "--out", "out"]
    assert run_cli(*arguments, *["--overwrite"][:overwrite]) == 2
    assert capsys.readouterr().err == (
        "error: out holds .work, compare.json, compare.md, and no comparison of lora-fast: choose "
        "a new or empty folder for --out\n"
    )
    assert {path.name for path in Path("out").rglob("*")} == {
        "compare.json", "compare.md", ".work", "mine",
    }  # fmt: skip


def test_a_comparison_killed_before_its_first_method_can_be_replaced(tiny: list[str]) -> None:
    found = {"methods": {}, "baselines": {}, "config": {}, "seeds": [0]}
    Path("out/.work").mkdir(parents=True)
    Path("out/compare.json").write_text(json.dumps(found))
    assert run_cli("compare", *tiny, "--methods", "probe", "--out", "out") == 0
    assert not Path("out/.work").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "qlora"], "--methods must be among lora, rslora"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--data", "absent.jsonl"], "--data absent.jsonl: no such file"),
    ],
)
def test_bad_input_gives_one_line(
    capsys: pytest.CaptureFixture[str], tiny: list[str], arguments: list[str], message: str
) -> None:
    assert run_cli("compare", *tiny, "--out", "out", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "ia3", "--r", "4"], "--method ia3 takes no --r"),
        (["--method", "delta-lora", "--dropout", "0.1"], "--method delta-lora takes no --dropout"),
        (["--method", "bitfit", "--compare"], "--method bitfit has no fused layers to --compare"),
    ],
)
def test_a_method_refuses_what_it_would_ignore(
    capsys: pytest.CaptureFixture[str], tiny: list[str], arguments: list[str], message: str
) -> None:
    assert run_cli("train", *tiny, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not Path("runs").exists()


def test_a_method_by_name(capsys: pytest.CaptureFixture[str], tiny: list[str]) -> None:
    assert run_cli("train", *tiny, "--method", "bitfit", "--out", "out") == 0
    shown = capsys.readouterr().out
    assert re.search(r"Method BitFit: [\d,]+ parameters to train", shown)
    assert "No adapted linear layers: nothing to fuse" in shown
    assert metrics_of(Path("out"))["config"]["method"] == "bitfit"
    assert Path("out/weights.safetensors").exists()
    assert not Path("out/effective_rank.png").exists()


def test_the_help_names_every_method(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in ("train", "compare"):
        run_cli(command, "--help")
        shown = capsys.readouterr().out
        for name in METHODS:
            assert name in shown
