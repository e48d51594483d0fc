"""How a command ends when something goes wrong: one line on stderr and an exit code."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from ..errors import (
    Interrupted,
    RunFailure,
    TrainingError,
    explain_write_failure,
    first_line,
)
from ..optional_packages import MissingPackageError, absent_package
from ..training.checkpoints import latest_step

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
LONGEST = 500


@contextmanager
def one_line_errors(
    out: Path,
    *,
    debug: bool,
    interruption: Callable[[BaseException, Path], str] | None = None,
) -> Iterator[None]:
    """End the command with one line for whatever goes wrong inside; ``debug`` adds the traceback.

    ``out`` is the folder that the command writes to. ``interruption`` returns the line for a
    command that was stopped; by default it says how to resume training.

    The exit code is 2 for wrong input, 1 for a failure, 130 for Ctrl-C.
    """
    try:
        yield
    except typer.Exit:
        raise
    except (Interrupted, KeyboardInterrupt) as stop:
        where = stop.out if isinstance(stop, Interrupted) else out
        _end((interruption or _resumable)(stop, where), EXIT_INTERRUPTED, debug)
    except Exception as error:
        known = explain(error, out)
        line = str(known)
        if interruption is None and isinstance(known, RunFailure):
            step = latest_step(out)
            line += f"; {_saved(step, out)}" if step is not None else ""
        _end(f"error: {line}", known.exit_code, debug)


def explain(error: Exception, out: Path) -> TrainingError:
    """An error whose one line says what happened and, if known, what to do."""
    if isinstance(error, TrainingError):
        return error
    if isinstance(error, MissingPackageError):
        return RunFailure(str(error))
    absent = absent_package(error) if isinstance(error, ModuleNotFoundError) else None
    if absent is not None:
        return RunFailure(f"{absent} is not installed: pip install 'lora_fast[train]'")
    if isinstance(error, ValueError) and str(error).startswith("LORA_FAST_BACKEND"):
        return TrainingError(first_line(error))
    written = explain_write_failure(error, out)
    if written is not None:
        return written
    if type(error).__name__ == "OutOfMemoryError" or getattr(error, "errno", 0) == errno.ENOMEM:
        return RunFailure(
            "out of memory: try a lower --batch-size with a higher --grad-accum, "
            "--gradient-checkpointing or a lower --max-length"
        )
    kind = type(error).__name__
    return RunFailure(f"{kind}: {first_line(error)} (--debug shows where)")


def _resumable(stop: BaseException, out: Path) -> str:
    step = stop.step if isinstance(stop, Interrupted) else latest_step(out)
    if step is None:
        return "interrupted before the first checkpoint: nothing to resume"
    return f"interrupted; {_saved(step, out)}"


def _saved(step: int | None, out: Path) -> str:
    return f"step {step} is saved, continue with: lora-fast train --resume --out {out}"


def _end(line: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(one_line(line), file=sys.stderr)
    raise typer.Exit(code)


def one_line(text: str) -> str:
    """A message as one line of printable characters, its middle left out if it is long.

    Messages quote input of any kind, such as names with line breaks or thousands of letters.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(shown) <= LONGEST:
        return shown
    return f"{shown[: LONGEST * 3 // 5]} … {shown[-LONGEST * 2 // 5 :]}"
