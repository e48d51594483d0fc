"""The process of one step: its units one after the other, each recorded in the journal.

    python -m bench.gpu_day.run_units STEP --out FOLDER [--rehearse]

A unit that raises is recorded as broken and the next one runs. After a failure that the device or
the process does not survive, a new process continues.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import absent
from .journal import Journal
from .runner import NEW_PROCESS
from .steps import STEPS, Step

FILE = "journal.jsonl"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Unit:
    """A measurement by itself. ``run`` returns its row: anything that JSON can hold; in it

    ok: False       it finished and found a fault
    summary         a few words for the terminal
    absent          a missing package or program: no result, and no failure
    new_process     True: the process must not run another unit
    """

    name: str
    run: Callable[[], dict[str, Any]]


def run_units(step: Step, units: list[Unit], journal: Journal) -> int:
    """Run the ``units`` that have no result in the journal; returns the exit status."""
    journal.append("units", step=step.name, units=[unit.name for unit in units])
    progress = journal.step(step.name)
    lacking = progress.lacking
    for unit in units:
        if unit.name in progress.broken_in_this_call:
            continue
        if unit.name in progress.rows and not absent.is_there(lacking.get(unit.name)):
            continue
        journal.append("start", step=step.name, unit=unit.name)
        started = time.monotonic()
        try:
            row = unit.run()
        except Exception as error:
            missing = absent.named_by(error)
            if missing is None:
                traceback.print_exc()
                journal.append("broken", step=step.name, unit=unit.name, reason=_first_line(error))
                if _device_is_lost():
                    return NEW_PROCESS
                continue
            row = absent.row(missing)
        finally:
            _free_device_memory()
        seconds = round(time.monotonic() - started, 2)
        journal.append("row", step=step.name, unit=unit.name, seconds=seconds, row=row)
        if row.get("new_process"):
            return NEW_PROCESS
    return 0


def _free_device_memory() -> None:
    """Collect modules that refer to one another in cycles; survivors are not searched again."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        gc.freeze()
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _device_is_lost() -> bool:
    """After a kernel's illegal access every later call on the device fails, too."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=[step.name for step in STEPS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    (step,) = (step for step in STEPS if step.name == options.step)
    end_with_parent()
    return run(step, options.out, rehearse=options.rehearse)


def end_with_parent() -> None:
    """Have the kernel end this process when its parent is killed, so that the GPU is released."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def run(step: Step, out: Path, *, rehearse: bool) -> int:
    """Make the units of ``step`` and run them."""
    from .day import day

    module, function = step.source.split(":")
    make: Any = getattr(importlib.import_module(f"{__package__}.{module}"), function)
    with day(rehearse=rehearse) as today:
        return run_units(step, make(today), Journal(out / FILE))


if __name__ == "__main__":
    sys.exit(main())
