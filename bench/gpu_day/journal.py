"""The journal: one line of JSON per event, on disk before the next one begins.

call      a call of the command began; what it runs on
units     a step has these units
start     a unit began
row       a unit ended, with its result
broken    a unit ended without one, and why
finished  a step has no unit left to try
stopped   a step ended before that, and why
forget    earlier events of a step no longer count
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Event = dict[str, Any]


@dataclass
class Progress:
    """The journal's record of one step. ``running``: the unit that began and has not ended."""

    units: list[str] = field(default_factory=list)
    rows: dict[str, Event] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    broken_in_this_call: set[str] = field(default_factory=set)
    running: str | None = None
    started: int = 0
    finished: bool = False
    stopped: str | None = None

    @property
    def done(self) -> bool:
        """Whether a later call has nothing to do: broken units are retried."""
        return self.finished and not self.broken

    @property
    def lacking(self) -> dict[str, str]:
        """Units without a result for lack of a package or program, and which."""
        found = {unit: event["row"].get("absent") for unit, event in self.rows.items()}
        return {unit: name for unit, name in found.items() if name is not None}

    @property
    def refuted(self) -> list[str]:
        """Units that finished and found a fault."""
        return [unit for unit, event in self.rows.items() if event["row"].get("ok") is False]


class Journal:
    """The file, which several processes append to, one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **fields: Any) -> None:
        """Write one event; it is on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"event": event, "at": round(time.time(), 3), **fields})
        with open(self.path, "ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a process was killed while it wrote
                    file.write(b"\n")
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def events(self, since: int = 0) -> list[Event]:
        """Events from byte ``since`` on; an incomplete line is left out."""
        if not self.path.is_file():
            return []
        found = []
        with open(self.path, "rb") as file:
            file.seek(since)
            for line in file:
                try:
                    found.append(json.loads(line))
                except ValueError:
                    continue
        return found

    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def calls(self) -> list[Event]:
        """What each call so far ran on."""
        return [event for event in self.events() if event["event"] == "call"]

    def progress(self) -> dict[str, Progress]:
        """Every step in the journal."""
        steps: dict[str, Progress] = {}
        call = -1
        for event in self.events():
            if event["event"] == "call":
                call += 1
                for step in steps.values():
                    step.broken_in_this_call.clear()
                    step.running, step.stopped = None, None
                continue
            name = event["step"]
            if event["event"] == "forget":
                steps.pop(name, None)
                continue
            _apply(steps.setdefault(name, Progress()), event, call)
        return steps

    def step(self, name: str) -> Progress:
        return self.progress().get(name, Progress())


def _apply(step: Progress, event: Event, call: int) -> None:
    kind, unit = event["event"], event.get("unit")
    if kind == "units":
        step.units, step.finished, step.stopped = event["units"], False, None
    elif kind == "start":
        step.running = unit
        step.started += 1
    elif kind == "row":
        step.rows[unit] = {**event, "call": call}
        step.broken.pop(unit, None)
        step.running = None
    elif kind == "broken":
        step.broken[unit] = event["reason"]
        step.broken_in_this_call.add(unit)
        step.running = None
    elif kind == "finished":
        step.finished = True
    elif kind == "stopped":
        step.stopped = event["reason"]
