"""Errors that stop a run: one line each, never a traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

_NO_SPACE = ("No space left on device", "os error 28")
SHOWN = 3
_CUT_OFF = ("PytorchStreamWriter failed writing file", "unexpected pos")


class TrainingError(Exception):
    """A run cannot start or continue, for a reason that the message gives in one line.

    ``exit_code``: 2 for wrong usage; 1 for a correct request that failed.
    """

    exit_code = 2


class RunFailure(TrainingError):
    """A correct request that failed."""

    exit_code = 1


class Interrupted(Exception):
    """The user stopped the run. ``out`` is where it can be resumed, ``step`` its last checkpoint.

    ``step`` is None when the run stopped before its first checkpoint.
    """

    def __init__(self, out: Path, step: int | None) -> None:
        super().__init__(f"interrupted; resume from {out}" if step else "interrupted")
        self.out = out
        self.step = step


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's message."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def explain_write_failure(error: BaseException, folder: Path) -> TrainingError | None:
    """An error with one line if ``error`` means that ``folder`` cannot be written.

    safetensors wraps the operating system's error in its text, and torch.save loses it: its
    message says only that the file was not written completely.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in _NO_SPACE):
        return RunFailure(f"no space left on the disk that holds {folder}")
    if any(text in str(error) for text in _CUT_OFF):
        return RunFailure(f"could not finish writing a file in {folder}: is the disk full?")
    if number == errno.EFBIG:
        return RunFailure(f"cannot write {folder}: {os.strerror(number)}")
    if number in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT):
        return TrainingError(f"{getattr(error, 'filename', folder)}: {os.strerror(number)}")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
        where = getattr(error, "filename", None) or folder
        return TrainingError(f"cannot write {where}: {os.strerror(number)}")
    return None


def some(names: Sequence[str]) -> str:
    """The first names of a list and the number of others."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def check_utf8(option: str, name: str) -> None:
    """Check that a name can be written into files, whatever bytes the file system accepts.

    Raises TrainingError: it is not UTF-8.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise TrainingError(f"{option} must be a name in UTF-8, got {name!r}") from None
