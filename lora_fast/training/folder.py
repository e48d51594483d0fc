"""The folder of a run: held by one process, and a run only once training has begun in it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .checkpoints import ARMS, CHECKPOINTS, latest_step
from .config import CONFIG_FILE, TrainConfig
from .errors import Interrupted, TrainingError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

RUNS = Path("runs")
METRICS_FILE = "metrics.json"


class RunFolder:
    """A run's folder and options. ``resumed``: the folder holds the run already."""

    def __init__(self, path: Path, config: TrainConfig, *, resumed: bool) -> None:
        self.path = path
        self.config = config
        self.resumed = resumed
        self._begun = False

    def results(self) -> dict[str, Any] | None:
        """Return ``metrics.json`` of a run that is resumed although it is finished, else None."""
        path = self.path / METRICS_FILE
        if not self.resumed or not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def begin(self) -> None:
        """Make the folder that of this run: its options go in, the run before goes out."""
        if self.resumed:
            return
        self._clear()
        self.config.save(self.path)
        self._begun = True

    def give_up(self) -> None:
        """Leave no run where the one that began has saved nothing that it could go on from."""
        if self._begun and not holds_run(self.path):
            self._clear()

    def _clear(self) -> None:
        (self.path / METRICS_FILE).unlink(missing_ok=True)
        for arm in ARMS:
            shutil.rmtree(self.path / CHECKPOINTS / arm, ignore_errors=True)
        with suppress(OSError):  # absent, or it holds checkpoints of others
            (self.path / CHECKPOINTS).rmdir()
        # Last: a run whose removal was cut off is still one that can be replaced.
        (self.path / CONFIG_FILE).unlink(missing_ok=True)


@contextmanager
def open_run(
    out: Path | None, config: TrainConfig, *, resume: bool, overwrite: bool
) -> Iterator[RunFolder]:
    """Hold ``out``, or the next free ``runs/N``, for a run with the options in ``config``.

    Resuming, the options are those stored in ``out``, or in the last run in ``runs``. A run that
    ends before it has saved anything leaves the folder as if it had never begun.

    Raises:
        TrainingError: ``out`` holds another run, none to resume, or is in use.
        Interrupted: for KeyboardInterrupt.
        OSError: ``out`` cannot be written.
    """
    if resume:
        out = out or last_run()
        config = TrainConfig.load(out)
    with held(out) as path:
        if holds_run(path) and not (resume or overwrite):
            raise TrainingError(
                f"{path} already holds a run: continue it with --resume, replace it with "
                "--overwrite, or choose another --out"
            )
        folder = RunFolder(path, config, resumed=resume)
        try:
            yield folder
        except BaseException:
            folder.give_up()
            raise


def holds_run(out: Path) -> bool:
    """Whether ``out`` holds a run with something to lose: a checkpoint, or results.

    One that was killed before its first checkpoint can be resumed, and replaced as well.
    """
    saved = (out / METRICS_FILE).exists() or latest_step(out) is not None
    return saved and (out / CONFIG_FILE).exists()


def last_run() -> Path:
    """Return the run in ``runs`` with the highest number, ``runs/1`` without any."""
    numbers = [number for number in _numbers() if (RUNS / str(number) / CONFIG_FILE).exists()]
    return RUNS / str(max(numbers, default=1))


@contextmanager
def held(out: Path | None) -> Iterator[Path]:
    """Make ``out``, or the next free ``runs/N``, and let no other process write there meanwhile.

    Folders that were made here and are empty in the end are removed again.

    Raises:
        TrainingError: another process holds it.
        Interrupted: for KeyboardInterrupt, with the last step that was saved.
        OSError: it cannot be written.
    """
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
    """The folder, and which of it and its parents were not there before, innermost first."""
    if out is not None:
        absent = [path for path in (out, *out.parents) if not path.exists()]
        out.mkdir(parents=True, exist_ok=True)
        return out, absent
    while True:
        out = RUNS / str(max(_numbers(), default=0) + 1)
        absent = [path for path in (out, RUNS) if not path.exists()]
        with suppress(FileExistsError):  # another process was quicker: the next number
            out.mkdir(parents=True)
            return out, absent


def _numbers() -> list[int]:
    return [int(path.name) for path in RUNS.glob("*") if path.name.isdecimal()]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, whatever ends it."""
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
        raise TrainingError(
            f"another process is writing {folder} at this moment: choose another --out"
        ) from None
    except OSError:
        pass  # some network file systems have no locks
    try:
        yield
    finally:
        os.close(handle)
