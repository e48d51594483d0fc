"""The folder of a run: locked by one process, and a run only once training has begun in it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import Interrupted, RunFailure, TrainingError, check_utf8, some
from ..files.run_files import CONFIG_FILE, stored_record
from .checkpoints import ARMS, CHECKPOINTS, latest_step
from .config import TrainConfig

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

RUNS = Path("runs")
METRICS_FILE = "metrics.json"
COMPARISON_FILE = "compare.json"
STAGING = ".saving"
# Files that every run writes when it ends; its tokenizer's files, whose names vary, come on top.
ARTEFACTS = (
    METRICS_FILE,
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "weights.safetensors",
    "layers.txt",
    "loss.png",
    "effective_rank.png",
)
# Options that distinguish run.json from any other file of that name.
MARKS = frozenset({"model", "data", "task", "method"})
EMPTY: Mapping[str, str] = MappingProxyType({})


class RunFolder:
    """A run's folder and options. ``resumed``: the folder already holds the run.

    ``moved``: inputs of a resumed run (``data``, ``eval_data``, ``model``) that were given again.
    ``record`` is what ``run.json`` holds beside the options: ``inputs``, digests of the run's
    inputs; ``resumed``, the steps at which it continued with changed ones; ``files``, all that it
    has written.
    """

    def __init__(
        self, path: Path, config: TrainConfig, *, resumed: bool, moved: Mapping[str, str] = EMPTY
    ) -> None:
        self.path = path
        self.config = replace(config, **dict[str, Any](moved))
        self.resumed = resumed
        self.moved = moved
        self.record: dict[str, Any] = stored_record(path) if resumed else {}
        self._begun = False

    def results(self) -> dict[str, Any] | None:
        """``metrics.json`` of a run that is resumed although it has finished, else None."""
        path = self.path / METRICS_FILE
        if not self.resumed or not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def begin(self, inputs: dict[str, Any], changed: list[str]) -> None:
        """Claim the folder for this run: write its options and delete the previous run.

        ``changed`` names the inputs of a resumed run that differ now.
        """
        if not self.resumed:
            self._clear()
        elif changed:
            stage = {"step": latest_step(self.path) or 0, "changed": changed}
            self.record.setdefault("resumed", []).append(stage)
        elif self.record.get("inputs"):
            return
        self.record["inputs"] = inputs
        self._save()
        self._begun = not self.resumed

    def give_up(self) -> None:
        """Remove the run if it has saved nothing that it could be resumed from."""
        if self._begun and not holds_run(self.path):
            self._clear()

    @contextmanager
    def publishing(self) -> Iterator[Path]:
        """A folder to write files to; they then move into the run's, ``metrics.json`` last.

        Raises TrainingError: a file of that name exists that the run has not written.
        """
        staging = self.path / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
            names = sorted(path.name for path in staging.iterdir())
            self._check_free(names)
            self.record["files"] = sorted({*self.record.get("files", []), *names})
            self._save()
            for name in sorted(names, key=lambda name: name == METRICS_FILE):
                os.replace(staging / name, self.path / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _check_free(self, names: Iterable[str]) -> None:
        own = self.record.get("files", [])
        there = [name for name in names if name not in own and (self.path / name).exists()]
        if there:
            raise TrainingError(
                f"{self.path} holds {some(there)}, which this run has not written: move it away "
                f"and continue with: lora-fast train --resume --out {self.path}"
            )

    def _save(self) -> None:
        self.config.located().save(self.path, self.record)

    def _clear(self) -> None:
        own = {*stored_record(self.path).get("files", []), *ARTEFACTS} if is_run(self.path) else ()
        for name in own:
            (self.path / name).unlink(missing_ok=True)
        for arm in ARMS:
            shutil.rmtree(self.path / CHECKPOINTS / arm, ignore_errors=True)
        with suppress(OSError):  # absent, or it holds checkpoints of others
            (self.path / CHECKPOINTS).rmdir()
        # Last: a run whose removal was interrupted can still be replaced.
        (self.path / CONFIG_FILE).unlink(missing_ok=True)


@contextmanager
def open_run(
    out: Path | None,
    config: TrainConfig,
    *,
    resume: bool,
    overwrite: bool,
    moved: Mapping[str, str] = EMPTY,
) -> Iterator[RunFolder]:
    """Lock ``out``, or the next free ``runs/N``, for a run with the options in ``config``.

    When resuming, the options are those stored in ``out``, or in the last run in ``runs``, except
    for the inputs in ``moved``. A run that ends before it has saved anything leaves the folder as
    it was. Files that no run has written are never touched.

    Raises TrainingError: ``out`` holds another run, or other files, or no run to resume; or is in
    use; Interrupted: for KeyboardInterrupt; OSError: ``out`` cannot be written.
    """
    if resume:
        out = out or last_run()
        config = TrainConfig.load(out)
    with held(out) as path:
        folder = RunFolder(path, config, resumed=resume, moved=moved)
        if not overwrite:
            _check_place(folder)
        elif not is_run(path):
            _refuse_files(path, "run of lora-fast train")
        try:
            yield folder
        except BaseException:
            folder.give_up()
            raise


def _check_place(folder: RunFolder) -> None:
    path = folder.path
    if not is_run(path):
        _refuse_files(path, "run of lora-fast train")
    elif not folder.resumed and holds_run(path):
        raise TrainingError(
            f"{path} already holds a run: continue it with --resume, replace it with "
            "--overwrite, or choose another --out"
        )
    elif not (folder.resumed and (path / METRICS_FILE).exists()):
        own = stored_record(path).get("files", [])
        there = [name for name in ARTEFACTS if name not in own and (path / name).exists()]
        if there:
            raise TrainingError(
                f"{path} holds {some(there)}, which its run has not written and would overwrite "
                "when it ends: move it away, or choose another --out"
            )


@contextmanager
def open_comparison(out: Path | None, *, overwrite: bool) -> Iterator[Path]:
    """Lock ``out``, or the next free ``runs/N``, for a comparison.

    One that ends before its first method has finished leaves the folder as it was.

    Raises TrainingError: ``out`` holds another comparison, or other files, or is in use;
    Interrupted: for KeyboardInterrupt; OSError: ``out`` cannot be written.
    """
    with held(out) as path:
        finished = compared_methods(path)
        if finished is None:
            _refuse_files(path, "comparison of lora-fast")
        elif finished and not overwrite:
            raise TrainingError(
                f"{path} already holds a comparison: replace it with --overwrite, "
                "or choose another --out"
            )
        try:
            yield path
        except BaseException:
            if compared_methods(path) == []:
                (path / COMPARISON_FILE).unlink()
            raise


def compared_methods(out: Path) -> list[str] | None:
    """The methods that the comparison in ``out`` has finished, None if there is none."""
    try:
        found = json.loads((out / COMPARISON_FILE).read_text())
        return list(found["methods"]) if found.keys() >= {"baselines", "config", "seeds"} else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _refuse_files(path: Path, kind: str) -> None:
    """Check that ``path`` is empty, or name the files in the way of a new ``kind``.

    Raises TrainingError: there is something in it.
    """
    names = sorted(entry.name for entry in path.iterdir())
    if names:
        raise TrainingError(
            f"{path} holds {some(names)}, and no {kind}: choose a new or empty folder for --out"
        )


def is_run(out: Path) -> bool:
    """Whether ``out`` is the folder of a run: ``run.json`` there holds options of one."""
    try:
        stored = json.loads((out / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(stored, dict) and stored.keys() >= MARKS


def holds_run(out: Path) -> bool:
    """Whether ``out`` holds a run with something to lose: a checkpoint, or results.

    A run killed before its first checkpoint can be resumed or replaced.
    """
    saved = (out / METRICS_FILE).exists() or latest_step(out) is not None
    return saved and (out / CONFIG_FILE).exists()


def last_run() -> Path:
    """The run in ``runs`` with the highest number, ``runs/1`` without any."""
    numbers = [number for number in _numbers() if (RUNS / str(number) / CONFIG_FILE).exists()]
    return RUNS / str(max(numbers, default=1))


@contextmanager
def held(out: Path | None) -> Iterator[Path]:
    """Make ``out``, or the next free ``runs/N``, and keep other processes from writing there.

    Folders that were made here and are empty in the end are removed again.

    Raises TrainingError: another process has locked it; Interrupted: for KeyboardInterrupt, with
    the last step that was saved; OSError: it cannot be written.
    """
    check_utf8("--out", str(out))
    path, made = _made(out)
    try:
        with _locked(path):
            yield path
    except KeyboardInterrupt as stop:
        raise Interrupted(path, latest_step(path)) from stop
    finally:
        for folder in made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _made(out: Path | None) -> tuple[Path, list[Path]]:
    """The folder, and which of it and its parents were created, innermost first."""
    if out is not None:
        absent = [path for path in (out, *out.parents) if not path.exists()]
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise TrainingError(
                f"--out must be where a folder can be made, got {out}: {error.strerror}"
            ) from error
        return out, absent
    while True:
        out = RUNS / str(max(_numbers(), default=0) + 1)
        absent = [path for path in (out, RUNS) if not path.exists()]
        with suppress(FileExistsError):  # another process was quicker: try the next number
            out.mkdir(parents=True)
            return out, absent


def _numbers() -> list[int]:
    return [int(path.name) for path in RUNS.glob("*") if path.name.isdecimal()]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise RunFailure(f"another process is writing to {folder}: choose another --out") from None
    except OSError:
        pass  # some network file systems have no locks
    try:
        yield
    finally:
        os.close(handle)
