"""Run a list of commands, each under a time limit, and keep their results in one JSON file.

A step whose result is in the file already is not run again, so that an interrupted run goes on
where it stopped. A step that fails keeps no result, and does not stop the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    """A command that writes JSON to the path that stands in for ``{json}``.

    ``{folder}`` stands for an empty folder, and ``result`` for a file in it that the command
    writes of its own accord.
    """

    name: str
    command: tuple[str, ...]
    limit_seconds: float
    result: str = "result.json"


def run_steps(
    steps: Sequence[Step], path: Path, about: dict[str, Any], cwd: Path, *, fresh: bool
) -> bool:
    """Run what ``path`` has no result of yet, save after every step; True if none failed.

    ``about`` (device, versions, commit) is stored with each result, since a later run may continue
    the file with another commit. ``fresh`` forgets the results of these steps first.
    """
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if fresh:
        names = {step.name for step in steps}
        results = {name: result for name, result in results.items() if name not in names}
    failed = []
    for step in steps:
        if step.name in results:
            print(f"== {step.name}: done before, skipped (--fresh runs it again)", flush=True)
            continue
        print(f"== {step.name}: at most {step.limit_seconds:.0f} s", flush=True)
        started = time.monotonic()
        try:
            data = _run(step, cwd)
        except StepFailed as error:
            print(f"== {step.name}: failed: {error}", flush=True)
            failed.append(step.name)
            continue
        seconds = round(time.monotonic() - started, 1)
        results[step.name] = {"seconds": seconds, "about": about, "data": data}
        _save(results, path)
    print(f"{len(results)} results in {path}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return not failed


class StepFailed(Exception):
    """A step ran out of time, exited with an error or wrote no result."""


def _run(step: Step, cwd: Path) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / step.result
        names = {"json": str(result), "folder": folder}
        command = [part.format_map(names) for part in step.command]
        process = subprocess.Popen(command, cwd=cwd, start_new_session=True)
        try:
            code = process.wait(step.limit_seconds)
        except subprocess.TimeoutExpired:
            raise StepFailed(f"not done after {step.limit_seconds:.0f} s") from None
        finally:
            _end(process)
        if code != 0:
            raise StepFailed(f"exit status {code}")
        try:
            return json.loads(result.read_text())
        except (OSError, ValueError) as error:
            raise StepFailed(f"no readable result: {error}") from None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the step and whatever it started; a hung kernel may hold them for a while."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _save(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)
