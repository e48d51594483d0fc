"""Run legs of the suite with other versions of what the package depends on, row by row.

A row is constraints.txt with some pins replaced: one for each version of Triton, one for the oldest
torch that pyproject.toml claims, one for its other lower bounds, one with DeepSpeed. Each has a
virtual environment of its own in .matrix/, kept for as long as pyproject.toml and the pins stay as
they are (--discard: until its row has run; an older torch takes 9 GB where pip finds only builds
with CUDA). Rows are independent: one that fails, or cannot be installed, leaves the others alone.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".matrix"
TRITONS = ("3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
# The PTX executor does not know the matrix descriptors that Triton 3.5 makes for sm_100; what
# Triton 3.9 makes for it is wrong, and refused (lora_fast/backend.py).
LEFT_OUT = {"3.5.1": "not sm_100", "3.9.0": "not sm_100"}
# Which none of the suite's dependencies brings along.
DEEPSPEED = {"deepspeed": "0.19.8"}
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[[^]]*\])?(?:>=(?P<bound>[\d.]+))?")


@dataclass(frozen=True)
class Row:
    """Versions that take the place of those in constraints.txt, and legs of tests/run.py."""

    name: str
    pins: dict[str, str]
    legs: tuple[str, ...]
    select: str = ""  # pytest's -k
    packages: tuple[str, ...] = ()  # beside the package and its tests


@dataclass(frozen=True)
class Result:
    """What became of a leg of a row."""

    row: Row
    leg: str
    verdict: str
    counts: str = ""

    @property
    def is_good(self) -> bool:
        return self.verdict == "ok"


def lower_bounds() -> dict[str, str]:
    """The oldest version of each package that pyproject.toml claims for users, tools left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    stated = [
        *project["dependencies"],
        *(line for name in ("train", "trl", "peft", "qlora") for line in extras[name]),
    ]
    found = (REQUIREMENT.match(line) for line in stated)
    return {match["name"]: match["bound"] for match in found if match and match["bound"]}


def rows() -> list[Row]:
    """Every row, the cheapest to install first."""
    oldest = lower_bounds()
    del oldest["triton"]  # its bound is the first of TRITONS
    torch = {"torch": oldest.pop("torch")}
    return [
        *(
            Row(f"triton-{v}", {"triton": v}, ("interpreter", "compiled"), LEFT_OUT.get(v, ""))
            for v in TRITONS
        ),
        Row("deepspeed", DEEPSPEED, ("default",), "deepspeed", tuple(DEEPSPEED)),
        Row("peft-oldest", oldest, ("default",)),
        Row("torch-oldest", torch, ("default", "interpreter")),
    ]


def constraints(row: Row) -> str:
    """constraints.txt with the pins of `row` in the place of its own."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if line.partition("==")[0] not in row.pins]
    return "\n".join([*kept, *(f"{name}=={version}" for name, version in row.pins.items()), ""])


def install(row: Row) -> Path:
    """The Python of the row's environment, which is made unless it is there. CalledProcessError."""
    folder = FOLDER / row.name
    python, stamp = folder / "venv" / "bin" / "python", folder / "installed.txt"
    wanted = (ROOT / "pyproject.toml").read_text() + constraints(row)
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "constraints.txt").write_text(constraints(row))
        print(f"\n== {row.name}: installing {describe(row)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        pip = (
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-compile",
            "--editable",
            ".[test]",
            *row.packages,
        )
        subprocess.run([*pip, "--constraint", folder / "constraints.txt"], cwd=ROOT, check=True)
        stamp.write_text(wanted)
    return python


def run(row: Row, legs: tuple[str, ...], jobs: int, extra: list[str]) -> Iterator[Result]:
    """Run `legs` in the environment of `row`."""
    try:
        python = install(row)
    except subprocess.CalledProcessError as error:
        yield Result(row, "", "NOT INSTALLED", f"pip ended with status {error.returncode}")
        return
    report = FOLDER / row.name / "result.json"
    for leg in legs:
        report.unlink(missing_ok=True)
        print(f"\n== {row.name}: {describe(row)}", flush=True)
        options = ("--leg", leg, "--jobs", str(jobs), "--json", str(report))
        options += (*(("-k", row.select) if row.select else ()), *extra)
        code = subprocess.run([python, "tests/run.py", *options], cwd=ROOT, check=False).returncode
        counts = ""
        if report.is_file():
            (outcome,) = json.loads(report.read_text())
            kinds = ("passed", "failed", "skipped")
            counts = ", ".join(f"{outcome[kind]} {kind}" for kind in kinds)
            counts += f" in {outcome['seconds']:.0f} s"
        yield Result(row, leg, "FAILED" if code else "ok", counts)


def describe(row: Row) -> str:
    return ", ".join(f"{name} {version}" for name, version in row.pins.items())


def table(results: list[Result]) -> str:
    lines = [(r.row.name, r.leg, r.verdict, r.counts) for r in results]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main() -> int:
    known = {row.name: row for row in rows()}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=known,
        default=list(known),
        metavar="ROW",
        help=f"run these (default: all): {', '.join(known)}",
    )
    parser.add_argument("--legs", nargs="+", metavar="LEG", help="instead of the row's own")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes (default 2)")
    parser.add_argument("--discard", action="store_true", help="remove each environment after use")
    options, extra = parser.parse_known_args()
    results: list[Result] = []
    for name in options.rows:
        row = known[name]
        results += run(row, tuple(options.legs or row.legs), options.jobs, extra)
        if options.discard:
            shutil.rmtree(FOLDER / name, ignore_errors=True)
    print("\n" + table(results), flush=True)
    return 0 if all(result.is_good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
