"""``--help`` shows every option in full, and every text prints on any terminal."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
import typer
from tiny_runs import library_logging, run_cli, save_llama, sentiment_rows, write_jsonl

from lora_fast.cli.app import app, main
from lora_fast.cli.help import definitions
from lora_fast.cli.streams import ASCII, prepare_streams

COMMANDS = typer.main.get_command(app).commands
WORDS = re.compile(r"[A-Za-z0-9_|.,=-]+")


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 200])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_cut_and_no_word_is_broken(
    command: str,
    columns: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run_cli(command, "--help") == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert max(map(len, lines)) <= columns
    assert "..." not in shown
    words = set(WORDS.findall(shown))
    for parameter in COMMANDS[command].params:
        for name in parameter.opts if parameter.param_type_name == "option" else []:
            assert name in words, name
        for word in WORDS.findall(parameter.help or ""):
            assert word in words, word


def test_terms_that_are_long_have_a_line_of_their_own() -> None:
    rows = [("--a", "one two three four"), ("--a-long-name|with|choices", "five")]
    assert definitions(rows, 24).splitlines() == [
        "  --a        one two",
        "             three four",
        "  --a-long-name|with|choices",
        "             five",
    ]


class Narrow(io.TextIOWrapper):
    """A stream like a Windows pipe or an old terminal."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)

    @property
    def text(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)


ENCODINGS = ["ascii", "cp1252", "cp437", "latin-1", "shift_jis", "utf-8"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_character_can_be_printed(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Narrow(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    prepare_streams()
    print("".join(ASCII), "💥 \udcff ok")
    assert stream.text.endswith("ok\n")
    for letter, plain in ASCII.items():
        try:
            letter.encode(encoding)
        except UnicodeEncodeError:
            assert plain in stream.text


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_commands_end_well_whatever_the_encoding(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    write_jsonl(tmp_path / "data.jsonl", ({"text": row["text"]} for row in sentiment_rows()))
    options = ["--model", "llama", "--task", "causal-lm", "--data", "data.jsonl", "--steps", "1"]
    for words in (
        ["train", *options, "--quantize", "none", "--out", "run"],
        ["merge", "llama", "run", "merged"],
        ["compare", *options, "--quantize", "none", "--methods", "lora,layernorm", "--out", "all"],
        ["plan", "llama", "--max-length", "16"],
        ["doctor", "--no-kernels", "--model", "llama"],
        ["tune", "llama", "--dry-run"],
    ):
        out, err = Narrow(encoding), Narrow(encoding)
        with library_logging(), monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            with pytest.raises(SystemExit) as end:
                main(words)
        # On a slow machine a command says what it is at.
        other = [line for line in err.text.splitlines() if not line.endswith(" ...")]
        assert (end.value.code, other) == (0, []), words
        assert out.text.endswith("\n")
