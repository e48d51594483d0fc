"""How a command ends when something goes wrong: one line on stderr and an exit code."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from lora_fast.optional_packages import MissingPackageError
from lora_fast.training.errors import (
    Interrupted,
    TrainingError,
    explain_write_failure,
    first_line,
)

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


@contextmanager
def one_line_errors(
    out: Path,
    *,
    debug: bool,
    interruption: Callable[[BaseException, Path], str] | None = None,
) -> Iterator[None]:
    """End the command with one line for whatever goes wrong inside; ``debug`` adds the traceback.

    ``out`` is the folder that the command writes to. ``interruption`` returns the line for a
    command that was stopped; without it, how to resume training.
    """
    try:
        yield
    except typer.Exit:
        raise
    except (Interrupted, KeyboardInterrupt) as stop:
        where = stop.out if isinstance(stop, Interrupted) else out
        _end((interruption or _resumable)(stop, where), EXIT_INTERRUPTED, debug)
    except Exception as error:
        _end(f"error: {explain(error, out)}", EXIT_ERROR, debug)


def explain(error: Exception, out: Path) -> str:
    """Return the line that tells the user what happened and, where known, what to do."""
    if isinstance(error, (TrainingError, MissingPackageError)):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: pip install 'lora_fast[train]'"
    if isinstance(error, ValueError) and str(error).startswith("LORA_FAST_BACKEND"):
        return first_line(error)
    written = explain_write_failure(error, out)
    if written is not None:
        return written
    if type(error).__name__ == "OutOfMemoryError" or getattr(error, "errno", 0) == errno.ENOMEM:
        return (
            "out of memory: try a lower --batch-size with a higher --grad-accum, "
            "--gradient-checkpointing or a lower --max-length"
        )
    kind = type(error).__name__
    return f"{kind}: {first_line(error)} (--debug shows where)"


def _resumable(stop: BaseException, out: Path) -> str:
    from lora_fast.training.checkpoints import latest_step

    step = stop.step if isinstance(stop, Interrupted) else latest_step(out)
    if step is None:
        return "interrupted before the first checkpoint: nothing to resume"
    return f"interrupted; step {step} is saved, continue with: lora-fast train --resume --out {out}"


def _end(line: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(line, file=sys.stderr)
    raise typer.Exit(code)
