"""Everything that needs a GPU, in one command that can be stopped and resumed.

    python -m bench.gpu_day                       all steps, most valuable first; minutes to hours
    python -m bench.gpu_day --budget 540          what fits into 540 seconds; call again to continue
    python -m bench.gpu_day --only layers         one step (repeatable)
    python -m bench.gpu_day --list                the steps
    python -m bench.gpu_day --rehearse --out DIR  every step without a GPU, tiny; times nothing
    python -m bench.gpu_day --rehearse --arch 90  kernels compiled for sm_90 instead of interpreted

Results go to bench/results/<device>: journal.jsonl, which records every event and lets a later call
resume, results.json, report.md, pictures and log.txt. Exit status 0: nothing that ran failed;
1: something failed; 2: something that the run needs is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .journal import Journal
from .run_units import FILE
from .runner import Runner, summary
from .steps import STEPS, STUB_ARCH, Step

ROOT = Path(__file__).resolve().parents[2]
REHEARSAL = "rehearsal, not a measurement"
# A unit asks for anything else it needs, and reports what is not installed (absent.py).
_NEEDED = ("numpy", "torch", "triton")
_PROBE_SECONDS = 180
# Of a budget; the report takes four seconds on two busy cores.
_REPORT_SECONDS = 10.0


def main(arguments: list[str] | None = None) -> int:
    started = time.monotonic()
    options = _options(arguments)
    if options.list:
        for step in STEPS:
            print(f"{step.name:15} {step.shows} (at most {step.limit:.0f} s)")
        return 0
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return _missing(f"the packages {', '.join(missing)} (pip install '.[dev]' has all)")
    env = _environment(options.rehearse, options.arch)
    about = _about(options.rehearse, env)
    if "missing" in about:
        return _missing(f"{about['missing']}; --rehearse walks through every step without one")
    out = (options.out or _default_folder(about, options.rehearse)).resolve()
    journal = Journal(out / FILE)
    for before in journal.calls()[:1]:
        if (before["name"], before["rehearsal"]) != (about["name"], options.rehearse):
            return _missing(f"another --out: {out} holds results of {_title(before)}")
    steps = [step for step in STEPS if not options.only or step.name in options.only]
    journal.append("call", rehearsal=options.rehearse, **about)
    if options.fresh:
        for step in steps:
            journal.append("forget", step=step.name)
    print(_title({**about, "rehearsal": options.rehearse}), flush=True)
    # What is timed on first use belongs to this day, not to the user's own file.
    env["LORA_FAST_CACHE_DIR"] = str(out / "choices")
    runner = Runner(journal, _command(out, options.rehearse), out / "log.txt", ROOT, env)
    budget = options.budget
    if budget is not None:
        budget -= time.monotonic() - started + _REPORT_SECONDS
    runner.run(steps, budget)
    reported = _report(out, env)
    return _verdict(steps, journal) or (0 if reported else 1)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_day",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [step.name for step in STEPS]
    parser.add_argument(
        "--budget", type=float, help="seconds, report included; the rest waits for the next call"
    )
    parser.add_argument("--only", action="append", choices=names, help="this step (repeatable)")
    parser.add_argument("--fresh", action="store_true", help="repeat units that have a result")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="walk through without a GPU")
    parser.add_argument(
        "--arch", type=int, help="with --rehearse: compile the kernels for it and run none"
    )
    parser.add_argument("--list", action="store_true", help="print the steps and exit")
    options = parser.parse_args(arguments)
    if options.arch and not options.rehearse:
        parser.error("--arch must come with --rehearse: a GPU has its own")
    return options


def _environment(rehearse: bool, arch: int | None) -> dict[str, str]:
    """The environment of every step. Triton decides at import whether it interprets."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("TRITON_INTERPRET", "LORA_FAST_BACKEND", "LORA_FAST_AUTOTUNE", STUB_ARCH)
    }
    env["PYTHONUNBUFFERED"] = "1"
    if rehearse:
        env.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        env.update({STUB_ARCH: str(arch)} if arch else {"TRITON_INTERPRET": "1"})
    return env


def _about(rehearse: bool, env: dict[str, str]) -> dict[str, Any]:
    """The device and versions, queried in a separate process, which a broken driver may hang."""
    command = [sys.executable, "-m", f"{__package__}.device", *(["--rehearse"] * rehearse)]
    try:
        asked = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=_PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"missing": f"a GPU that answers within {_PROBE_SECONDS} s"}
    if asked.returncode != 0:
        return {"missing": f"a working torch: {asked.stderr.strip()[-400:]}"}
    about: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    return about


def _missing(what: str) -> int:
    print(f"make gpu needs {what}", file=sys.stderr)
    return 2


def _default_folder(about: dict[str, Any], rehearse: bool) -> Path:
    if rehearse:
        return ROOT / "runs" / "gpu_day_rehearsal"
    return ROOT / "bench" / "results" / folder_name(about["name"])


def folder_name(device_name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` → ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def _title(about: dict[str, Any]) -> str:
    return f"{about['name']}: {REHEARSAL}" if about["rehearsal"] else str(about["name"])


def _command(out: Path, rehearse: bool) -> Any:
    def command(step: Step) -> list[str]:
        module = f"{__package__}.run_units"
        flags = ["--rehearse"] if rehearse else []
        return [sys.executable, "-m", module, step.name, "--out", str(out), *flags]

    return command


def _report(out: Path, env: dict[str, str]) -> bool:
    """Write results.json, report.md and the pictures in a separate process, which may fail."""
    command = [sys.executable, "-m", f"{__package__}.report", str(out)]
    env = {name: value for name, value in env.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=env, timeout=600).returncode == 0


def _verdict(steps: list[Step], journal: Journal) -> int:
    """1 if anything that ran failed; names it, and what is left."""
    progress = journal.progress()
    failed = left = 0
    for step in steps:
        found = progress.get(step.name)
        if found is None or not (found.finished or found.stopped):
            print(f"left: {step.name}")
            left += 1
        elif found.refuted or found.broken or found.stopped:
            print(f"failed: {step.name}: {summary(found)}")
            failed += 1
    if left:
        print("The same command continues with the rest.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
