"""Run the whole test suite: every leg, regardless of the others, and one summary line.

The legs are separate processes because Triton decides at import whether it compiles or interprets.
A leg that fails, crashes or finds no test makes the run fail.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Leg:
    """One pytest process: what it selects and what its environment adds."""

    name: str
    select: str
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """Counts of one leg. ``failed`` includes errors, and is at least 1 when the process failed."""

    leg: Leg
    passed: int
    failed: int
    skipped: int
    seconds: float
    cpu_seconds: float


def cpu_legs() -> list[Leg]:
    """The legs that need no GPU."""
    unmarked = "not interpreter and not compiled and not offline"
    return [
        Leg("default", f"{unmarked} and not gpu and not exhaustive"),
        Leg("interpreter", "interpreter and not gpu and not exhaustive", {"TRITON_INTERPRET": "1"}),
        Leg("compiled", "(compiled or offline) and not gpu and not exhaustive"),
        Leg(
            "pretended",
            "pretended and not exhaustive",
            {"PYTEST_PLUGINS": "tests.pretended_gpu.device"},
        ),
    ]


# What the caller's shell may have set. Without bytecode every worker of every leg rewrites the
# asserts of all test files anew, and every child process compiles the package.
NO_PART_OF_THE_SUITE = {"TRITON_INTERPRET", "LORA_FAST_BACKEND", "PYTHONDONTWRITEBYTECODE"}


# The rest of the matrices of which the other legs run a part.
EXHAUSTIVE_LEG = Leg("exhaustive", "exhaustive and not gpu")
GPU_LEG = Leg("gpu", "gpu")


def run_leg(leg: Leg, jobs: int, extra: list[str]) -> Outcome:
    """Run ``leg`` with ``jobs`` workers of one thread each and count its results."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-m", leg.select, "-p", "no:benchmark"),
            *("-n", str(jobs), "--dist", "worksteal", "--timeout", "600", "--durations", "5"),
            *(f"--junitxml={report}", *extra),
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **leg.env}
        for name in NO_PART_OF_THE_SUITE - leg.env.keys():
            env.pop(name, None)
        print(f"\n== {leg.name}: pytest -m '{leg.select}'", flush=True)
        started, cpu_started = time.monotonic(), _cpu_seconds()
        code = subprocess.run(command, cwd=ROOT, env=env, check=False).returncode
        seconds, cpu_seconds = time.monotonic() - started, _cpu_seconds() - cpu_started
        return Outcome(leg, *_count(report, code), seconds, cpu_seconds)


def _cpu_seconds() -> float:
    """CPU time of all children so far: what a leg costs on a machine that has other work, too."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _count(report: Path, code: int) -> tuple[int, int, int]:
    """Passed, failed, skipped in pytest's JUnit file; a failed process has at least one failure."""
    total = failed = skipped = 0
    if report.is_file():
        for suite in ET.parse(report).getroot().iter("testsuite"):
            total += int(suite.get("tests", 0))
            failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            skipped += int(suite.get("skipped", 0))
    passed = max(0, total - failed - skipped)
    if code != 0:
        failed = max(1, failed)
    return passed, failed, skipped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="worker processes per leg (default 2)")
    parser.add_argument(
        "--leg",
        action="append",
        choices=["default", "interpreter", "compiled", "pretended", "exhaustive", "gpu"],
        help="run this leg (repeatable); without it: default, interpreter, compiled, pretended",
    )
    parser.add_argument(
        "--cpu-kind",
        choices=["plain", "packed"],
        help="run as on a CPU without AVX512-BF16, or with it, whichever this one is",
    )
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    options, extra = parser.parse_known_args()
    if options.cpu_kind:
        extra = [f"--cpu-kind={options.cpu_kind}", *extra]
    legs = cpu_legs()
    if options.leg:
        legs = [leg for leg in (*legs, EXHAUSTIVE_LEG, GPU_LEG) if leg.name in options.leg]
    outcomes = [run_leg(leg, options.jobs, extra) for leg in legs]
    print()
    for o in outcomes:
        verdict = "FAILED" if o.failed else "ok"
        print(
            f"{o.leg.name:12} {verdict:7} {o.passed} passed, {o.failed} failed, "
            f"{o.skipped} skipped in {o.seconds:.0f} s (CPU {o.cpu_seconds:.0f} s)"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    totals = [sum(getattr(o, key) for o in outcomes) for key in ("passed", "failed", "skipped")]
    print("{} passed, {} failed, {} skipped".format(*totals), flush=True)
    return 1 if totals[1] else 0


if __name__ == "__main__":
    sys.exit(main())
