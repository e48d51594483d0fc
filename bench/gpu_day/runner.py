"""Runs steps, each in its own process, and survives their failures.

A process that ends early loses its current unit, and a new one continues with the rest. A unit over
its time limit is ended in the same way. A step over its limit is ended, and the next one begins.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import absent
from .journal import Event, Journal, Progress
from .steps import Step

NEW_PROCESS = 75
"""Exit status of a process whose remaining units need a new process (EX_TEMPFAIL)."""

_POLL_SECONDS = 0.1
# Less than this is not worth starting a process for.
_LEAST_SECONDS = 20.0
_LOG_LINES = 12


@dataclass(frozen=True)
class Runner:
    """``command(step)`` starts the process of a step, ``log`` takes what it prints."""

    journal: Journal
    command: Callable[[Step], list[str]]
    log: Path
    cwd: Path
    env: Mapping[str, str]
    least_seconds: float = _LEAST_SECONDS

    def run(self, steps: Iterable[Step], budget: float | None) -> None:
        """Run the units without a result, within ``budget`` seconds. SIGTERM also ends the step."""
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
        try:
            self._run_steps(steps, budget)
        finally:
            signal.signal(signal.SIGTERM, before)

    def _run_steps(self, steps: Iterable[Step], budget: float | None) -> None:
        deadline = time.monotonic() + (budget if budget is not None else float("inf"))
        for step in steps:
            if is_done(self.journal.step(step.name)):
                print(f"== {step.name}: done before (--fresh runs it again)", flush=True)
                continue
            left = deadline - time.monotonic()
            if left < min(self.least_seconds, step.limit):
                print(f"== {step.name}: no time left for it in this call", flush=True)
                continue
            print(f"== {step.name}: {step.shows} (at most {min(left, step.limit):.0f} s)")
            self._run_step(step, deadline)
            print(f"   {summary(self.journal.step(step.name))}", flush=True)

    def _run_step(self, step: Step, deadline: float) -> None:
        own_deadline = time.monotonic() + step.limit
        while True:
            started_before = self.journal.step(step.name).started
            log_before = self.log.stat().st_size if self.log.is_file() else 0
            ended = self._run_process(step, min(deadline, own_deadline))
            progress = self.journal.step(step.name)
            if ended == "exit status 0":
                self.journal.append("finished", step=step.name)
                return
            if ended == _OUT_OF_TIME:
                if own_deadline <= deadline:
                    reason = f"not done after {step.limit:.0f} s"
                    self.journal.append("stopped", step=step.name, reason=reason)
                else:
                    print("   stopped by the budget; another call continues here")
                return
            if ended != f"exit status {NEW_PROCESS}":
                self._show_log(log_before)
                if progress.running is not None:
                    unit = progress.running
                    self.journal.append("broken", step=step.name, unit=unit, reason=ended)
                    print(f"   {unit}: {ended}", flush=True)
            if progress.started == started_before:
                self.journal.append("stopped", step=step.name, reason=ended)
                return

    def _run_process(self, step: Step, deadline: float) -> str:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                self.command(step), cwd=self.cwd, env=dict(self.env), preexec_fn=os.setpgrp,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            return self._watch(process, step, deadline)
        finally:
            _end(process)

    def _watch(self, process: subprocess.Popen[bytes], step: Step, deadline: float) -> str:
        """How the process ended, or why it must be ended; prints rows as they arrive."""
        seen, progressed = self.journal.size(), time.monotonic()
        while True:
            code = process.poll()
            now = time.monotonic()
            if self.journal.size() > seen:
                events, seen = self.journal.events(seen), self.journal.size()
                progressed = now
                for event in events:
                    _print(event)
            if code is not None:
                return f"exit status {code}" if code >= 0 else f"killed by signal {-code}"
            if now >= deadline:
                return _OUT_OF_TIME
            if now - progressed > step.unit_limit:
                return f"not done after {step.unit_limit:.0f} s"
            time.sleep(_POLL_SECONDS)

    def _show_log(self, since: int) -> None:
        with open(self.log, "rb") as log:
            log.seek(since)
            lines = log.read().decode(errors="replace").splitlines()
        for line in lines[-_LOG_LINES:]:
            print(f"   | {line}")


_OUT_OF_TIME = "out of time"


def is_done(progress: Progress) -> bool:
    """Whether a call has nothing to do; missing packages may be installed by now."""
    return progress.done and not any(map(absent.is_there, set(progress.lacking.values())))


def summary(progress: Progress) -> str:
    """One line on a step: units with a result, broken ones, refuted ones, and why it ended."""
    lacking = progress.lacking
    results = len(progress.rows) - len(lacking)
    parts = [f"{results} of {len(progress.units)} units have a result"]
    for name in dict.fromkeys(lacking.values()):
        count = list(lacking.values()).count(name)
        parts.append(f"{count} not, since {name} is not installed")
    if progress.refuted:
        parts.append(f"{len(progress.refuted)} FAILED: {', '.join(progress.refuted)}")
    if progress.broken:
        parts.append(f"{len(progress.broken)} BROKEN: {', '.join(progress.broken)}")
    if progress.stopped:
        parts.append(f"STOPPED: {progress.stopped}")
    return "; ".join(parts)


def _print(event: Event) -> None:
    if event["event"] == "row":
        said = event["row"].get("summary", "done")
        print(f"   {event['unit']}: {said} ({event['seconds']:.0f} s)", flush=True)
    elif event["event"] == "broken":
        print(f"   {event['unit']}: BROKEN: {event['reason']}", flush=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children; a hung kernel may delay that."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
