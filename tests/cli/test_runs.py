"""Folders of the command line's runs: which one, when it counts as a run, what remains of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from tiny_runs import metrics_of, run_cli, save_bert, sentiment_rows, write_jsonl

from lora_fast.cli.console import Terminal
from lora_fast.training import run as run_module
from lora_fast.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("libraries_as_before")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_bert(folder / "bert")
    write_jsonl(folder / "data.jsonl", sentiment_rows())
    return folder


@pytest.fixture
def tiny(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of a short run on the tiny model, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    options = {"model": folder / "bert", "data": folder / "data.jsonl", "steps": 2, "r": 4}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file, its bytes and when they were written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# The loss of the third step is no number.
DIVERGING = ("--lr", "1e30", "--steps", "3", "--save-every", "3")


@pytest.mark.parametrize(
    "options",
    [
        ("--data", "absent.jsonl"),
        ("--data", "absent.jsonl", "--out", "a/b"),
        ("--target-modules", "foo"),
        ("--optim", "galore_adamw", "--out", "a/b"),
        DIVERGING,
    ],
)
def test_a_start_that_failed_leaves_nothing(tiny: list[str], options: tuple[str, ...]) -> None:
    assert run_cli("train", *tiny, *options) == (1 if options == DIVERGING else 2)
    assert list(Path().iterdir()) == []


def test_what_was_there_stays_when_a_start_fails(tiny: list[str]) -> None:
    Path("out").mkdir()
    TrainConfig().save(Path("out"))  # of a run that was killed before its first checkpoint
    Path("out/checkpoints").mkdir()
    Path("out/checkpoints/mine").write_text("mine")
    for wrong in (["--data", "absent.jsonl"], ["--optim", "galore_adamw"]):
        assert run_cli("train", *tiny, "--out", "out", *wrong) == 2
        assert Path("out/checkpoints/mine").read_text() == "mine"


FOREIGN = {
    "notes": {"README.md": "my notes", "metrics.json": '{"mine": 1}'},
    "an adapter": {"adapter_config.json": "{}", "adapter_model.safetensors": "trained elsewhere"},
    "a tokenizer": {"tokenizer.json": "{}"},
    "another run.json": {"run.json": '{"mine": 1}', "loss.png": "a picture"},
    "no json": {"run.json": "{"},
    "a folder": {"checkpoints/lora_fast/mine": "x"},
    "hidden": {".git/HEAD": "ref"},
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_that_is_no_run_is_not_touched(
    tiny: list[str], files: dict[str, str], overwrite: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path("out")
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    before = contents(out)
    assert run_cli("train", *tiny, "--out", out, *["--overwrite"][:overwrite]) == 2
    names = ", ".join(sorted({Path(name).parts[0] for name in files}))
    assert capsys.readouterr().err == (
        f"error: out holds {names}, and no run of lora-fast train: choose a new or empty folder "
        "for --out\n"
    )
    assert contents(out) == before


def test_files_that_came_into_the_folder_of_a_run_are_not_overwritten(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path("out")
    out.mkdir()
    TrainConfig(r=4).save(out)
    (out / "README.md").write_text("mine")
    for options in ([*tiny], ["--resume"]):
        assert run_cli("train", *options, "--out", out) == 2
        assert "out holds README.md, which its run has not written and would overwrite" in (
            capsys.readouterr().err
        )
    assert (out / "README.md").read_text() == "mine"


def test_overwriting_a_run_takes_away_what_it_wrote_and_nothing_else(tiny: list[str]) -> None:
    out = Path("out")
    options = [*tiny, "--quantize", "none", "--out", out]
    assert run_cli("train", *options) == 0
    (out / "notes.txt").write_text("mine")
    (out / "checkpoints" / "mine").mkdir()
    assert (out / "adapter_model.safetensors").exists()
    without_rank = [*options[: options.index("--r")], *options[options.index("--r") + 2 :]]
    assert run_cli("train", *without_rank, "--method", "bitfit", "--overwrite") == 0
    names = {path.name for path in out.iterdir()}
    assert {"weights.safetensors", "notes.txt"} <= names
    assert not {"adapter_config.json", "adapter_model.safetensors"} & names
    assert (out / "checkpoints" / "mine").is_dir()


def test_options_may_be_corrected_until_there_is_something_to_lose(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path("out")
    assert run_cli("train", *tiny, "--out", out, "--target-modules", "foo") == 2
    # A run that was killed before its first checkpoint leaves its options, and half a checkpoint.
    Path("out/checkpoints/lora_fast/checkpoint-9").mkdir(parents=True)
    TrainConfig(target_modules="foo", r=4).save(out)
    capsys.readouterr()
    assert run_cli("train", *tiny, "--out", out, "--target-modules", "query", "--compare") == 0
    assert metrics_of(out)["config"]["target_modules"] == "query"
    assert json.loads(Path("out/run.json").read_text())["target_modules"] == "query"
    assert not Path("out/checkpoints/lora_fast/checkpoint-9").exists()
    shown = capsys.readouterr().out

    before = contents(out)
    assert run_cli("train", *tiny, "--out", out) == 2
    assert "out already holds a run: continue it with --resume" in capsys.readouterr().err
    assert run_cli("train", *tiny, "--out", out, "--overwrite", "--data", "absent.jsonl") == 2
    assert contents(out) == before

    # A finished run is shown again, even without its inputs.
    stored = json.loads(Path("out/run.json").read_text())
    Path("out/run.json").write_text(json.dumps({**stored, "model": "./gone"}))
    before = contents(out)
    capsys.readouterr()
    assert run_cli("train", "--resume", "--out", out) == 0
    again = capsys.readouterr().out
    assert "The run in out has finished" in again
    assert again.endswith(shown[shown.index("10 held-out examples") :])
    assert contents(out) == before

    # It is deleted once its successor has begun, which also leaves nothing.
    wrong = ["--overwrite", "--optim", "galore_adamw"]
    assert run_cli("train", *tiny, "--out", out, *wrong) == 2
    assert not {Path("out/run.json"), Path("out/metrics.json")} & contents(out).keys()


def test_a_run_killed_before_its_first_checkpoint_resumes_with_its_options(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    TrainConfig(r=4, target_modules="query").save(Path())
    seen: list[TrainConfig] = []

    def failing(config: TrainConfig) -> None:
        seen.append(config)
        raise OSError("the disk is away")

    monkeypatch.setattr(run_module, "load_rows", failing)
    for _ in range(2):
        assert run_cli("train", "--resume", "--out", ".") == 1
    assert seen == [TrainConfig(r=4, target_modules="query")] * 2


def test_ctrl_c_before_the_first_checkpoint_leaves_nothing(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run_module, "load_rows", interrupted)
    assert run_cli("train", *tiny) == 130
    error = capsys.readouterr().err
    assert error == "interrupted before the first checkpoint: nothing to resume\n"
    assert list(Path().iterdir()) == []


def test_a_second_ctrl_c_says_where_the_run_is(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(self: Terminal, number: int, *numbers: float) -> None:
        if number == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Terminal, "step", impatient)
    assert run_cli("train", *tiny, "--save-every", "1") == 130
    error = capsys.readouterr().err
    assert error == (
        "interrupted; step 1 is saved, continue with: lora-fast train --resume --out runs/1\n"
    )


@pytest.mark.parametrize("command", ["train", "compare"])
def test_two_at_once_have_folders_of_their_own(
    tiny: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins while the first reads its data."""
    module = run_module
    if command == "compare":
        from lora_fast.training import comparison as module  # type: ignore[no-redef]
    inside: list[list[str]] = []

    def stop(*_: object) -> None:
        inside.append(sorted(path.name for path in Path("runs").iterdir()))
        if len(inside) == 1:
            run_cli(command, *without_rank)
        raise KeyboardInterrupt

    without_rank = tiny[:-2]
    monkeypatch.setattr(module, "load_rows", stop)
    assert run_cli(command, *without_rank) == 130
    assert inside == [["1"], ["1", "2"]]
    assert not Path("runs").exists()


def test_two_cannot_share_a_folder(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(*_: object) -> None:
        capsys.readouterr()
        assert run_cli("train", *tiny, "--out", "out", "--overwrite") == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "load_rows", second)
    assert run_cli("train", *tiny, "--out", "out") == 130
    error = capsys.readouterr().err
    assert error.startswith("error: another process is writing to out")


def test_numbers_are_not_reused_and_resume_takes_the_last_run(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("9", "10", "notes", "11"):
        Path("runs", name).mkdir(parents=True)
    TrainConfig().save(Path("runs/9"))
    TrainConfig(lr=0.5).save(Path("runs/10"))  # and 11 has a comparison in it, or nothing
    assert run_cli("train", "--resume", "--lr", "0.1") == 2
    assert "--resume continues with --lr 0.5" in capsys.readouterr().err
    made: list[bool] = []

    def stop(*_: object) -> None:
        made.append(Path("runs/12").is_dir())
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "load_rows", stop)
    assert run_cli("train", *tiny) == 130
    assert made == [True]
    assert not Path("runs/12").exists()
