"""Which failures to write are recognised, through the libraries that wrap them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from lora_fast.training.errors import explain_write_failure, first_line

OUT = Path("runs/1")
CUT_OFF = "could not write a file in runs/1 to its end: is the disk full?"
FULL = "no space left on the disk that holds runs/1"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), FULL),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), FULL),
        (SafetensorError("I/O error: No space left on device (os error 28)"), FULL),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"), CUT_OFF),
        (PermissionError(errno.EACCES, "denied", "/x/y"), "cannot write /x/y: Permission denied"),
        (OSError(errno.EROFS, "ro"), "cannot write runs/1: Read-only file system"),
        (OSError(errno.EIO, "broken"), None),
        (RuntimeError("a shape mismatch"), None),
    ],
)
def test_failures_to_write(error: Exception, expected: str | None) -> None:
    assert explain_write_failure(error, OUT) == expected


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_is_really_full() -> None:
    for write, expected in (
        (lambda: Path("/dev/full").write_text("x" * 100_000), FULL),
        (lambda: torch.save(torch.zeros(100_000), "/dev/full"), CUT_OFF),
    ):
        with pytest.raises((OSError, RuntimeError)) as caught:
            write()
        assert explain_write_failure(caught.value, OUT) == expected


def test_first_line_is_one_that_says_something() -> None:
    assert first_line(ValueError("\n\n  what\nmore")) == "what"
    assert first_line(KeyError()) == "KeyError"
