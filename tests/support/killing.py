"""Processes that end with SIGKILL at a chosen moment of their work, independent of timing.

A moment is each time that Python opens, lists, makes, renames or deletes a file or folder, just
before it does, and each call of the ``tick`` that the work is given.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

Work = Callable[[Callable[[], None]], None]

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
_LOOKS = {"open", "os.listdir", "os.scandir"}


def moments(work: Work, folder: Path) -> list[str]:
    """Do `work`, which is about files in `folder`, in a process of its own; return its moments."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    assert _run(work, folder, None, sender) == 0
    return receiver.recv()


def kill(work: Work, folder: Path, moment: int) -> None:
    """Do `work` in a process of its own and kill it when so many moments have passed."""
    assert _run(work, folder, moment, None) == -signal.SIGKILL, "it was to be killed, and was not"


def _run(work: Work, folder: Path, moment: int | None, sender: Connection | None) -> int | None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_child, args=(work, folder, moment, sender))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "it neither ended nor died"
    return process.exitcode


def _child(work: Work, folder: Path, moment: int | None, sender: Connection | None) -> None:
    torch.set_num_threads(1)  # the threads of the parent are not there after a fork
    passed: list[str] = []

    def passing(name: str) -> None:
        if len(passed) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        passed.append(name)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in _CHANGES or (event in _LOOKS and str(folder) in str(arguments[0])):
            passing(event)

    sys.addaudithook(hook)
    work(lambda: passing("tick"))
    if sender is not None:
        sender.send(passed)
