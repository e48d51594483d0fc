"""The work of one run, divided among processes by architecture."""

from __future__ import annotations

import sys
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from bench.instruments.device_label import default_device, steady

from . import counting
from .counting import Selection

Rows = dict[str, list[dict[str, Any]]]
PARTS = ("counts", "launches", "kernels")


def count(selection: Selection, jobs: int) -> Rows:
    """The rows of ``selection`` by part (PARTS), by ``jobs`` processes."""
    archs = sorted({*selection.code_archs, *selection.archs})
    with _pool(jobs) as pool:
        parts = list(pool.map(run, [Task(selection, arch) for arch in (*archs, None)]))
    return {name: [row for part in parts for row in part.get(name, ())] for name in PARTS}


@dataclass(frozen=True)
class Task:
    """lora_fast on one architecture; None: everybody else."""

    selection: Selection
    arch: int | None


def run(task: Task) -> Rows:
    """The rows of one task."""
    steady(default_device())
    what = "the others" if task.arch is None else f"lora_fast on sm_{task.arch}"
    print(f"counting {what}", file=sys.stderr, flush=True)
    if task.arch is None:
        return {"counts": counting.others(task.selection)}
    return counting.device(task.selection, task.arch)


class _Here(Executor):
    """One job needs no process of its own."""

    def map(self, fn: Any, *iterables: Any, **_: Any) -> Any:
        return map(fn, *iterables)


def _pool(jobs: int) -> Executor:
    if jobs > 1:
        return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    return _Here()
