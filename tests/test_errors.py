"""Failures to write are recognised through the libraries that wrap them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from lora_fast.errors import explain_write_failure, first_line

OUT = Path("runs/1")
CUT_OFF = "could not finish writing a file in runs/1: is the disk full?"
FULL = "no space left on the disk that holds runs/1"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), FULL),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), FULL),
        (SafetensorError("I/O error: No space left on device (os error 28)"), FULL),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"), CUT_OFF),
        (OSError(errno.EFBIG, "big"), "cannot write runs/1: File too large"),
    ],
)
def test_failures_to_write(error: Exception, expected: str) -> None:
    found = explain_write_failure(error, OUT)
    assert (str(found), found.exit_code) == (expected, 1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError(errno.EACCES, "denied", "/x/y"), "cannot write /x/y: Permission denied"),
        (OSError(errno.EROFS, "ro"), "cannot write runs/1: Read-only file system"),
        (OSError(errno.ELOOP, "loop", "/x"), "/x: Too many levels of symbolic links"),
    ],
)
def test_places_that_cannot_be_written_are_wrong_input(error: Exception, expected: str) -> None:
    found = explain_write_failure(error, OUT)
    assert (str(found), found.exit_code) == (expected, 2)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), RuntimeError("a shape mismatch")])
def test_other_failures_are_not_explained(error: Exception) -> None:
    assert explain_write_failure(error, OUT) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_is_really_full() -> None:
    for write, expected in (
        (lambda: Path("/dev/full").write_text("x" * 100_000), FULL),
        (lambda: torch.save(torch.zeros(100_000), "/dev/full"), CUT_OFF),
    ):
        with pytest.raises((OSError, RuntimeError)) as caught:
            write()
        assert str(explain_write_failure(caught.value, OUT)) == expected


def test_first_line_is_one_that_says_something() -> None:
    assert first_line(ValueError("\n\n  what\nmore")) == "what"
    assert first_line(KeyError()) == "KeyError"
