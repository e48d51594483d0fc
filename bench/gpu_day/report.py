"""The journal of a GPU day as results.json, report.md and pictures, at any time.

    python -m bench.gpu_day.report FOLDER

Needs no GPU. Modelled numbers (bench/results/offline) stand beside the measured ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from . import absent, measured_e, tables
from .journal import Journal, Progress
from .modelled import Modelled
from .run_units import FILE
from .steps import STEPS

REHEARSAL = "REHEARSAL, NOT A MEASUREMENT: every time in here is a stand-in"
_CONTESTS = {
    "layers": "Decoder layers, forward + backward",
    "shorter_layers": "Decoder layers of fewer tokens, forward + backward",
    "linears": "Adapted linears",
    "inference": "Few rows without gradients",
    "experts": "Blocks of experts, forward + backward",
    "operations": "Groups, other methods and single kernels",
}


def main(arguments: list[str]) -> int:
    (folder,) = (Path(argument) for argument in arguments)
    write(folder)
    return 0


def write(folder: Path) -> None:
    """results.json, report.md and the pictures."""
    results = collected(Journal(folder / FILE))
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    drawn: list[Path] = measured_e.write(results, folder)
    modelled = Modelled(_arch(results))
    (folder / "report.md").write_text(text(results, modelled))
    if absent.is_there("matplotlib"):
        from . import plots

        drawn += plots.draw(results, modelled, folder)
    else:
        print("no pictures: matplotlib is not installed")
    print("written:", *(folder / name for name in ("results.json", "report.md")), *drawn)


def collected(journal: Journal) -> dict[str, Any]:
    """Everything in the journal, in the order of the steps."""
    calls, progress = journal.calls(), journal.progress()
    return {
        "note": REHEARSAL if any(call["rehearsal"] for call in calls) else None,
        "calls": [{k: v for k, v in call.items() if k != "event"} for call in calls],
        "steps": {step.name: _step(progress[step.name]) for step in STEPS if step.name in progress},
    }


def _step(progress: Progress) -> dict[str, Any]:
    return {
        "units": progress.units,
        "finished": progress.finished,
        "stopped": progress.stopped,
        "broken": progress.broken,
        "absent": progress.lacking,
        "rows": {
            unit: {"call": event["call"], "seconds": event["seconds"], **event["row"]}
            for unit, event in progress.rows.items()
            if unit not in progress.lacking
        },
    }


def _arch(results: dict[str, Any]) -> int | None:
    for call in results["calls"]:
        major, minor = call["capability"]
        return int(10 * major + minor)
    return None


def text(results: dict[str, Any], modelled: Modelled) -> str:
    """The report in Markdown."""
    last = results["calls"][-1] if results["calls"] else {"name": "nothing ran"}
    steps = results["steps"]
    parts = [f"# {last['name']}"]
    if results["note"]:
        parts.append(f"**{results['note']}.**")
    parts += [_about(results["calls"]), "## Steps", tables.steps(steps)]
    failures = tables.failures(steps)
    if failures:
        parts += ["## What failed", failures]
    for name, title in _CONTESTS.items():
        rows = steps.get(name, {}).get("rows")
        if rows:
            parts += [f"## {title}", tables.contests(rows, modelled)]
    for name, make in (
        ("decisive", tables.decisive),
        ("crossover", tables.crossover),
        ("candidates", tables.candidates),
        ("accuracy", tables.accuracy),
        ("profile", lambda rows: tables.profile(rows, modelled)),
    ):
        rows = steps.get(name, {}).get("rows")
        if rows:
            parts += [f"## {name.capitalize()}", make(rows)]
    note = f"\n\n**{results['note']}.**\n\n" if results["note"] else "\n\n"
    head, *rest = parts
    sections = "\n\n".join(rest).split("\n\n## ")
    return f"{head}\n\n" + f"{note}## ".join(sections) + "\n"


def _about(calls: list[dict[str, Any]]) -> str:
    lines = [
        "Times are medians over rounds in which all contestants take turns, taken by CUDA events "
        "on an idle device with a flushed cache, quartiles in brackets: `eager` launch by launch, "
        "`graph` as a CUDA graph. `over` is the median of the ratios to the floor in the same "
        "round, `modelled` the modelled ratio, of the linears alone. Extra ms are those beyond the "
        "floor. TFLOP/s count the products of the equation, GB/s the compulsory traffic; peak MB "
        "is the peak memory of a step beyond weights and input.",
        "",
    ]
    for number, call in enumerate(calls):
        said = {k: v for k, v in call.items() if k not in ("at", "name", "rehearsal") and v}
        lines.append(f"- call {number}: " + ", ".join(f"{k} {v}" for k, v in said.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
