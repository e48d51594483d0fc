"""Every option of every command with wrong values: one line, exit code 2, no traceback."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from peft import LoraConfig, get_peft_model
from tiny_runs import run_cli, save_bert, save_llama, sentiment_rows, write_jsonl
from transformers import AutoModelForCausalLM

from lora_fast.cli.app import app
from lora_fast.cli.errors import one_line

pytestmark = pytest.mark.usefixtures("libraries_as_before")

COMMANDS = typer.main.get_command(app).commands
TRAINED = ["--model", "bert", "--data", "data.jsonl", "--steps", "1", "--quantize", "none"]
ARGUMENTS: dict[str, list[str]] = {
    "train": TRAINED,
    "compare": [*TRAINED, "--methods", "lora"],
    "plan": ["llama"],
    "merge": ["llama", "adapter", "merged"],
    "tune": ["llama", "--dry-run"],
    "doctor": ["--no-kernels", "--model", "llama"],
}
WRONG = {
    "empty": "",
    "blank": " ",
    "word": "four",
    "negative": "-1",
    "zero": "0",
    "nan": "nan",
    "infinite": "1e999",
    "folder": "dir",
    "loop of links": "loop",
    "noise": "noise",
    "two lines": "a\nb",
    "no text": "\udcff",
    "long": "x" * 5000,
    "unreadable": "/proc/self/mem",
}
# What is right: a value of 0, the name of a new folder; and target modules that the model does not
# have, which a comparison tells in the row of the method.
RIGHT = {
    ("dropout", "zero"), ("warmup", "zero"), ("seed", "zero"),
    *(("out", kind) for kind in ("word", "negative", "zero", "nan", "infinite")),
}  # fmt: skip
IN_ROWS = ("compare", "target_modules")


def _cases() -> list[Any]:
    """Every option × every wrong value; the suite tries an empty one and two drawn ones of each."""
    draw, found = random.Random(0), []
    for command, arguments in COMMANDS.items():
        for option in arguments.params:
            if getattr(option, "is_flag", False) or (command, option.name) == IN_ROWS:
                continue
            wrong = [kind for kind in WRONG if (option.name, kind) not in RIGHT]
            usual = {"empty", *draw.sample(wrong[1:], 2)}
            for kind in wrong:
                marks = [] if kind in usual else [pytest.mark.exhaustive]
                name = f"{command}-{option.name}-{kind}"
                found.append(pytest.param(command, option, WRONG[kind], id=name, marks=marks))
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    save_bert(folder / "bert")
    save_llama(folder / "llama")
    write_jsonl(folder / "data.jsonl", sentiment_rows())
    (folder / "loop").symlink_to("loop")
    (folder / "dir").mkdir()
    (folder / "dir" / "file").write_text("mine")
    (folder / "noise").write_bytes(bytes(range(256)) * 10)
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder


@pytest.mark.parametrize(("command", "option", "value"), _cases())
def test_wrong_values_are_told_in_one_line(
    command: str,
    option: Any,
    value: str,
    inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(inputs)
    before = sorted(inputs.rglob("*"))
    arguments = list(ARGUMENTS[command])
    if option.param_type_name == "argument":
        places = [p.name for p in COMMANDS[command].params if p.param_type_name == "argument"]
        arguments[places.index(option.name)] = value
    else:
        arguments += [option.opts[0], value]
    code = run_cli(command, *arguments)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 600, said
    assert code == 2, said
    assert "--debug" not in said and "Traceback" not in said
    names = {option.opts[0].removeprefix("--"), option.name.replace("_", " "), "an argument"}
    assert any(name in said.lower() for name in names) or one_line(value)[:20] in said, said
    assert sorted(inputs.rglob("*")) == before, "nothing was written"


def test_every_command_is_tried() -> None:
    assert COMMANDS.keys() == ARGUMENTS.keys()
    tried = {(case.values[0], case.values[1].name) for case in _cases() if not case.marks}
    assert ("train", "target_modules") in tried and ("merge", "base") in tried
    assert len(tried) > 70


@pytest.mark.parametrize(
    "words",
    [["train", "--out="], ["train", "--target-modules="], ["merge", "", "a", "b"], [""]],
    ids=str,
)
def test_an_empty_word_is_never_ignored(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*words) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: (--[a-z-]+|an argument) must not be empty\n", said), said


def test_a_value_of_several_lines_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", "--out", "a\nb"], ["train", "--out=a\nb"]):
        assert run_cli(*words) == 2
        assert capsys.readouterr().err == "error: --out must be one line, got 'a\\nb'\n"


def test_target_modules_that_no_method_takes_are_not_ignored(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(inputs)
    arguments = [*TRAINED, "--methods", "probe,bitfit", "--target-modules", "query"]
    assert run_cli("compare", *arguments) == 2
    assert "--target-modules is not used by --methods probe,bitfit" in capsys.readouterr().err
    shutil.rmtree("runs", ignore_errors=True)
