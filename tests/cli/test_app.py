"""The command line: exit codes, one-line errors, Ctrl-C and --resume, output."""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from rich.table import Table
from tiny_runs import (
    metrics_of,
    run_cli,
    save_bert,
    save_llama,
    sentiment_rows,
    write_jsonl,
)

import lora_fast
from lora_fast.cli import console as terminal_module
from lora_fast.cli.console import Terminal, duration, print_whole
from lora_fast.cli.errors import explain, one_line
from lora_fast.training import run as run_module
from lora_fast.training import trainer as trainer_module
from lora_fast.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("libraries_as_before")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_bert(folder / "bert")
    save_llama(folder / "llama", chat_template=None)
    write_jsonl(folder / "data.jsonl", sentiment_rows())
    return folder


@pytest.fixture
def tiny(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of a short run on the tiny model, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    options = {"model": folder / "bert", "data": folder / "data.jsonl", "steps": 4, "r": 4}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run; return the exit code and stderr, which must be one line."""
    code = run_cli(*arguments)
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return code, error.rstrip("\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("--version") == 0
    assert capsys.readouterr().out == f"lora_fast {lora_fast.__version__}\n"


def test_help_is_quick_and_names_every_option() -> None:
    code = (
        "import sys; from lora_fast.cli.app import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    options = {"--" + field.name.replace("_", "-") for field in fields(TrainConfig)}
    options |= {"--out", "--resume", "--overwrite", "--debug"}
    assert options <= set(re.findall(r"--[a-z-]+", found.stdout))


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli() == 2
    shown = capsys.readouterr()
    assert "train" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--r", "four"], "Invalid value for '--r'"),
        (["train", "--stepz", "4"], "No such option: --stepz"),
        (["trane"], "No such command 'trane'"),
        (
            ["train", "--resume", "out"],
            "Got unexpected extra argument(s) (out): a value follows its",
        ),
    ],
)
def test_wrong_usage(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, error = failure(capsys, *arguments)
    assert code == 2
    assert error.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "absent.jsonl"], "--data absent.jsonl: no such file"),
        (["--data", "broken.jsonl"], "--data broken.jsonl, line 2: not JSON"),
        (
            ["--data", "unlabelled.jsonl"],
            "--data unlabelled.jsonl, line 1: has no 'label', got ['text']; --task causal-lm",
        ),
        (["--model", "./absent"], "--model ./absent cannot be loaded: no such folder"),
        (["--model", "unreadable"], "--model unreadable cannot be loaded: "),
        (
            ["--target-modules", "query,q_proj"],
            "--target-modules: the model has no module 'q_proj'",
        ),
        (["--lr", "-1"], "--lr must be positive, got -1.0"),
        (["--quantize", "int4"], "--quantize must be one of nf4, none"),
        (["--optim", "sgdd"], "--optim must be one of adamw_torch, "),
        (["--optim", "paged_adamw_8bit"], "--optim paged_adamw_8bit needs a GPU"),
        (["--lr", "1e30"], "the loss is "),
        (["--max-length", "1000"], "--max-length must be at most 48"),
        (["--resume"], "nothing to resume: out holds no run; name its folder with --out"),
        (["--data", "."], "--data must be a jsonl file, got the folder ."),
        (["--eval-data", "absent.jsonl"], "--eval-data absent.jsonl: no such file"),
        (["--model", "broken.jsonl"], "--model must be a folder or a hub id, got the file"),
        (["--task", "causal-lm", "--model", "builtin"], "--task causal-lm needs --model"),
    ],
)
def test_bad_input_gives_one_line(
    capsys: pytest.CaptureFixture[str],
    tiny: list[str],
    folder: Path,
    arguments: list[str],
    message: str,
) -> None:
    Path("broken.jsonl").write_text('{"text": "a", "label": 1}\n{"text"\n')
    Path("unlabelled.jsonl").write_text('{"text": "a"}\n')
    save_bert(Path("unreadable"))
    Path("unreadable/model.safetensors").write_bytes(b"\x00" * 100)
    capsys.readouterr()
    code, error = failure(capsys, "train", *tiny, "--out", "out", *arguments)
    assert code == (1 if message == "the loss is " else 2)
    assert error.startswith(f"error: {message}")
    assert not Path("out/metrics.json").exists()


def test_conversations_need_a_chat_template(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    talk = [{"role": "user", "content": "sky"}]
    data = write_jsonl(tmp_path / "talk.jsonl", [{"messages": talk}] * 2 + [{"text": "the sea"}])
    options = ("--task", "causal-lm", "--model", folder / "llama", "--data", data)
    code, error = failure(capsys, "train", *options, "--out", tmp_path / "out")
    assert (code, error) == (
        2,
        "error: the tokenizer has no chat template: give 'text' instead of 'messages'",
    )


def test_a_folder_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tiny: list[str]
) -> None:
    Path("file").write_text("")
    for out in ("file", "file/below", "/proc/below"):
        code, error = failure(capsys, "train", *tiny, "--out", out)
        assert code == 2
        assert error.startswith(f"error: --out must be where a folder can be made, got {out}: ")


@pytest.mark.parametrize("where", ["checkpoint", "artefacts"])
def test_a_full_disk(
    capsys: pytest.CaptureFixture[str],
    tiny: list[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "checkpoint":
        monkeypatch.setattr(trainer_module.OrderedTrainer, "_save_checkpoint", full)
    else:
        monkeypatch.setattr(run_module, "save_artefacts", full)
    code, error = failure(capsys, "train", *tiny, "--out", "out")
    saved = "; step 4 is saved, continue with: lora-fast train --resume --out out"
    assert code == 1
    assert error == "error: no space left on the disk that holds out" + (
        saved if where == "artefacts" else ""
    )


def test_a_traceback_on_request_only(capsys: pytest.CaptureFixture[str], tiny: list[str]) -> None:
    assert run_cli("train", *tiny, "--data", "absent", "--debug") == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("error: --data absent: no such file\n")


def test_what_was_not_foreseen_is_named() -> None:
    out = Path("out")

    def told(error: Exception) -> tuple[str, int]:
        known = explain(error, out)
        return str(known), known.exit_code

    assert told(RuntimeError("what\nmore")) == ("RuntimeError: what (--debug shows where)", 1)
    line, code = told(torch.OutOfMemoryError("CUDA"))
    assert line.startswith("out of memory: try a lower --b") and code == 1
    backend = ValueError("LORA_FAST_BACKEND must be one of auto, triton, torch, got 'x'")
    assert told(backend) == (str(backend), 2)
    absent = ModuleNotFoundError("No module named 'peft'", name="peft")
    assert told(absent) == ("peft is not installed: pip install 'lora_fast[train]'", 1)
    assert told(OSError(errno.ENAMETOOLONG, "x", "name")) == ("name: File name too long", 2)


def test_a_message_is_one_line_of_printable_characters() -> None:
    assert one_line("a\nb\x00 \x1b[31m ✓ \udcff") == r"a\nb\x00 \x1b[31m ✓ \udcff"
    long = one_line("begin" + 10_000 * "x" + "end")
    assert long.startswith("begin") and long.endswith("end") and len(long) < 510


def test_ctrl_c_in_the_middle_then_resume(
    capsys: pytest.CaptureFixture[str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_cli("train", *tiny, "--out", "whole") == 0
    step = Terminal.step

    def interrupted(self: Terminal, number: int, *numbers: float) -> None:
        step(self, number, *numbers)
        if number == 1:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Terminal, "step", interrupted)
        capsys.readouterr()
        code, error = failure(capsys, "train", *tiny, "--out", "cut")
    assert code == 130
    assert error == (
        "interrupted; step 2 is saved, continue with: lora-fast train --resume --out cut"
    )
    assert run_cli("train", "--resume", "--out", "cut") == 0
    assert "Training with lora_fast from step 2" in capsys.readouterr().out
    assert (
        metrics_of(Path("cut"))["results"]["lora_fast"]["losses"]
        == (metrics_of(Path("whole"))["results"]["lora_fast"]["losses"])
    )
    adapters = [Path(n, "adapter_model.safetensors").read_bytes() for n in ("cut", "whole")]
    assert adapters[0] == adapters[1]


def test_ctrl_c_before_there_is_a_checkpoint(
    capsys: pytest.CaptureFixture[str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run_module, "load_rows", interrupted)
    code, error = failure(capsys, "train", *tiny, "--out", "out")
    assert code == 130
    assert error == "interrupted before the first checkpoint: nothing to resume"


def test_a_resumed_run_keeps_its_options(
    capsys: pytest.CaptureFixture[str], tiny: list[str]
) -> None:
    TrainConfig(r=4, lr=0.5).save(Path("."))
    code, error = failure(capsys, "train", "--resume", "--out", ".", "--r", "4", "--lr", "0.1")
    assert (code, error) == (2, "error: --resume continues with --lr 0.5, got --lr 0.1")


def test_a_run_shows_its_scores_and_where_it_is(
    capsys: pytest.CaptureFixture[str], tiny: list[str]
) -> None:
    assert run_cli("train", *tiny, "--compare", "--out", "out") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for text in (
        "majority class", "linear probe", "stock PEFT", "lora_fast", "ROC AUC", "ratio",
        "trainable parameters", "tokens/s", "activations saved for backward",
        "13 of 13 adapted layers fused", "step 4/4", "Largest difference of the two loss curves",
        "Adapter, metrics.json, pictures: out", " K parameters, NF4, float32 on cpu",
        "86 examples to train, 10 held out", "4 steps of 32 examples, learning rate 0.0005",
    ):  # fmt: skip
        assert text in shown.out, text
    assert "\x1b" not in shown.out, "no escape sequences outside a terminal"


class TestTerminal:
    def shown(self, **options: Any) -> tuple[Terminal, io.StringIO]:
        file = io.StringIO()
        return Terminal(Console(file=file, width=120, highlight=False, **options)), file

    def test_a_bar_in_a_terminal(self) -> None:
        terminal, file = self.shown(force_terminal=True, color_system=None)
        with terminal:
            terminal.stage("Reading")
            terminal.training("stock", 2, 40)
            terminal.step(3, 0.25, 1e-3, 1234.0)
            assert terminal._progress is not None
            terminal._progress.refresh()
            terminal.trained()
        assert "3/40" in file.getvalue()
        assert "loss 0.250 · 1,234 tok/s" in file.getvalue()
        assert "✓ Training with stock PEFT from step 2" in file.getvalue()

    def test_lines_in_a_log(self) -> None:
        terminal, file = self.shown(force_terminal=False)
        with terminal:
            terminal.training("lora_fast", 0, 40)
            for step in range(1, 41):
                terminal.step(step, 0.5, 1e-3, 10.0)
            terminal.trained()
        assert file.getvalue().count("loss 0.500") == 10
        assert "step 40/40" in file.getvalue()

    def test_a_stage_that_failed_is_not_ticked_off(self) -> None:
        terminal, file = self.shown(force_terminal=False)
        with pytest.raises(ValueError, match="no"), terminal:
            terminal.stage("One")
            terminal.stage("Two [x]")
            raise ValueError("no")
        assert "✓ One" in file.getvalue()
        assert "Two" not in file.getvalue()

    def test_a_note_comes_after_the_tick_of_what_is_over(self) -> None:
        terminal, file = self.shown(force_terminal=False)
        with terminal:
            terminal.stage("One")
            terminal.done()
            terminal.note("said")
            terminal.stage("Two")
            terminal.done(well=False)
            terminal.note("failed")
        assert [line[:6] for line in file.getvalue().splitlines()] == ["✓ One ", "! said", "! fail"]

    def test_a_table_is_whole_on_a_narrow_terminal(self) -> None:
        file = io.StringIO()
        table = Table("a long title", "another one of them")
        table.add_row("prompt tuning of all", "495.032 ± 0.722")
        print_whole(Console(file=file, width=20), table)
        assert "prompt tuning of all" in file.getvalue() and "495.032 ± 0.722" in file.getvalue()
        assert len({len(line) for line in file.getvalue().splitlines()}) == 1

    def test_markup_of_others_is_text(self) -> None:
        terminal, file = self.shown(force_terminal=False)
        with terminal:
            terminal.note("[red]model[/red]")
            terminal.stage("[dim]stage")
        assert "! [red]model[/red]" in file.getvalue()
        assert "✓ [dim]stage" in file.getvalue()


def test_durations() -> None:
    assert [duration(s) for s in (0.04, 59.94, 60, 125.9)] == [
        "0.0 s",
        "59.9 s",
        "1 min 0 s",
        "2 min 5 s",
    ]


def test_quiet_libraries_are_quiet() -> None:
    terminal_module.quiet_libraries()
    names = ("transformers", "huggingface_hub.utils._http")
    assert not any(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in names)


def test_the_hub_s_client_is_quiet_when_it_is_imported_later() -> None:
    """Its import resets the level; its messages are every attempt of every request."""
    terminal_module.quiet_libraries()
    logger = logging.getLogger("huggingface_hub")
    handlers = list(logger.handlers)
    importlib.reload(hub_logging)
    logger.handlers[:] = handlers
    assert os.environ["HF_HUB_VERBOSITY"] == "error"
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
