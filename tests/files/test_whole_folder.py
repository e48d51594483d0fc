"""A folder is completely the old or the new one, and only models are ever deleted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from killing import kill, moments

from lora_fast.files import whole_folder
from lora_fast.files.json_files import PARTIAL
from lora_fast.files.safe_files import INDEX
from lora_fast.files.whole_folder import WholeFolder

OLD = {"config.json": "old", "model.safetensors": "old", "merges.txt": "old"}
NEW = {"config.json": "new", "model-00001-of-00002.safetensors": "new"}


def write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def replace(out: Path) -> None:
    with WholeFolder(out, overwrite=True) as whole:
        (whole.path / ".tmpAbC123").write_text("half a file, as safetensors writes it")
        write(whole.path, NEW)
        (whole.path / ".tmpAbC123").unlink()


def start(out: Path) -> None:
    """Start writing over a model, which must stay."""
    with pytest.raises(FileExistsError), WholeFolder(out):
        raise AssertionError("it was to be refused")


STEPS = [
    pytest.param(
        True,
        marks=pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are two steps"),
        id="one-step",
    ),
    pytest.param(False, id="two-steps"),
]


@pytest.fixture
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(whole_folder, "_exchange", lambda one, other: False)
    return request.param


@pytest.mark.parametrize("exchange", STEPS, indirect=True)
def test_killed_at_any_moment_a_model_is_replaced_whole_or_not_at_all(
    exchange: bool, tmp_path: Path
) -> None:
    rehearsal = write(tmp_path / "rehearsal" / "out", OLD)
    passed = moments(lambda tick: replace(rehearsal), tmp_path)
    assert content(rehearsal) == NEW and names(rehearsal.parent) == ["out"]
    found, absent = [], 0
    for moment in range(len(passed)):
        out = write(tmp_path / str(moment) / "out", OLD)
        kill(lambda tick, out=out: replace(out), tmp_path, moment)
        if out.exists():
            assert content(out) in (OLD, NEW), f"killed at moment {moment}: {passed[moment]}"
        else:
            absent += 1
            assert content(out.with_name(".out.replaced")) == OLD
        start(out)
        found.append(content(out))
        assert names(out.parent) == ["out"], "whoever starts next deletes what the killed one left"
    assert found == sorted(found, key=[OLD, NEW].index)
    assert found[0] == OLD and found[-1] == NEW
    assert absent == (0 if exchange else 1)


def test_killed_at_any_moment_a_new_model_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    passed = moments(lambda tick: replace(tmp_path / "rehearsal" / "out"), tmp_path)
    there = []
    for moment in range(len(passed)):
        out = tmp_path / str(moment) / "out"
        kill(lambda tick, out=out: replace(out), tmp_path, moment)
        there.append(out.exists())
        assert not out.exists() or content(out) == NEW
        replace(out)
        assert content(out) == NEW and names(out.parent) == ["out"]
    assert not there[0] and there[-1]


@pytest.mark.parametrize("exchange", STEPS, indirect=True)
def test_a_failure_leaves_the_old_model_and_nothing_beside_it(
    exchange: bool, tmp_path: Path
) -> None:
    out = write(tmp_path / "out", OLD)
    with pytest.raises(KeyboardInterrupt), WholeFolder(out, overwrite=True) as whole:
        write(whole.path, NEW)
        raise KeyboardInterrupt
    assert content(out) == OLD and names(tmp_path) == ["out"]
    replace(out)
    assert content(out) == NEW and names(tmp_path) == ["out"]


def test_two_writers_of_one_folder_keep_apart(tmp_path: Path) -> None:
    with WholeFolder(tmp_path / "out") as first:
        write(first.path, NEW)
        with pytest.raises(BlockingIOError, match="another process"), WholeFolder(tmp_path / "out"):
            pass
        assert content(first.path) == NEW
    assert content(tmp_path / "out") == NEW


@pytest.mark.parametrize("exchange", STEPS, indirect=True)
def test_nobody_takes_over_a_model_that_its_replacer_is_deleting(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, delete = write(tmp_path / "out", OLD), whole_folder._delete
    met = []

    def meanwhile(folder: Path) -> None:
        met.append(folder)
        with pytest.raises(BlockingIOError, match="another process"), WholeFolder(out):
            pass
        assert content(folder) == OLD
        delete(folder)

    monkeypatch.setattr(whole_folder, "_delete", meanwhile)
    replace(out)
    assert len(met) == 1
    assert content(out) == NEW and names(tmp_path) == ["out"]


def test_what_is_no_model_is_not_replaced(tmp_path: Path) -> None:
    foreign = [
        ({**OLD, "thesis.txt": "mine"}, "with thesis.txt: choose"),
        ({**OLD, "README.md": "mine"}, "with README.md: choose"),
        ({**OLD, "adapter_config.json": "mine"}, "with adapter_config.json: choose"),
        ({**OLD, **dict.fromkeys("abcde", "mine")}, "with a, b, c and 2 more: choose"),
        ({"config.json": "mine"}, "without config.json and weights"),
        ({"model.safetensors": "mine"}, "without config.json and weights"),
    ]
    for number, (files, message) in enumerate(foreign):
        out = write(tmp_path / str(number), files)
        with pytest.raises(ValueError, match=message), WholeFolder(out, overwrite=True):
            pass
        assert content(out) == files
    write(tmp_path / "deep" / "notes", {"thesis.txt": "mine"})
    write(tmp_path / "deep", OLD)
    with (
        pytest.raises(ValueError, match="with notes/"),
        WholeFolder(tmp_path / "deep", overwrite=True),
    ):
        pass
    assert content(tmp_path / "deep" / "notes") == {"thesis.txt": "mine"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="must be a folder"), WholeFolder(tmp_path / "file"):
        pass
    assert names(tmp_path) == [*map(str, range(len(foreign))), "deep", "file"]


def test_what_comes_while_the_new_model_is_written_stays(tmp_path: Path) -> None:
    out = write(tmp_path / "out", OLD)
    with (
        pytest.raises(ValueError, match=r"with thesis\.txt"),
        WholeFolder(out, overwrite=True) as w,
    ):
        write(w.path, NEW)
        (out / "thesis.txt").write_text("mine")
    assert content(out) == {**OLD, "thesis.txt": "mine"} and names(tmp_path) == ["out"]


def test_nothing_of_what_a_killed_writer_left_gets_into_the_new_model(tmp_path: Path) -> None:
    begun = ("model-00002-of-00009.safetensors", ".tmpAbC123", INDEX + PARTIAL)
    write(tmp_path / ".out.merging", dict.fromkeys(begun, ""))
    write(tmp_path / ".out.replaced", OLD)
    replace(write(tmp_path / "out", OLD))
    assert content(tmp_path / "out") == NEW and names(tmp_path) == ["out"]


@pytest.mark.parametrize("left", [".out.merging", ".out.replaced"])
def test_a_folder_of_that_name_with_other_things_in_it_stays(left: str, tmp_path: Path) -> None:
    write(tmp_path / left, {"thesis.txt": "mine"})
    with pytest.raises(ValueError, match=r"with thesis\.txt"), WholeFolder(tmp_path / "out"):
        pass
    assert content(tmp_path / left) == {"thesis.txt": "mine"} and names(tmp_path) == [left]


def test_a_link_is_followed_to_the_model_that_is_replaced(tmp_path: Path) -> None:
    real = write(tmp_path / "disk" / "model", OLD)
    (tmp_path / "out").symlink_to(real)
    replace(tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and content(real) == NEW
    assert names(tmp_path) == ["disk", "out"] and names(real.parent) == ["model"]


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write(tmp_path / "out", {})
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    with pytest.raises(ValueError, match="must not be a mount point"), WholeFolder(out):
        pass
    assert names(tmp_path) == ["out"]
