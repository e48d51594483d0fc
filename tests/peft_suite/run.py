"""PEFT's own tests as an acceptance run: stock, and with every model accelerated.

    python tests/peft_suite/run.py [--jobs 2] [--files vera lorafa ...] [pytest arguments]

Downloads the source distribution of the installed PEFT, which contains its tests, from PyPI into
the virtual environment, once, adds the files that it lacks, and runs the tests of LoRA, VeRA, DoRA,
AdaLoRA and (IA)³ twice. Of the models of the hub there are stand-ins for those of
``target_parameters``; tests that need another one fail in both runs. Fails if a test
changes its outcome, if a call that the README promises to run fused did not, or if no call did.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from local_models import save_models

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FILES = [
    "custom_models",
    "vera",
    "loraplus",
    "lorafa",
    "lora_variants",
    "lora_conversion",
    "lora_ga",
    "initialization",
    "low_level_api",
    "tuners_utils",
    "mixed",
    "target_parameters",
    "integrations",
    "trainable_tokens",
    "other",
    "bdlora",
    "helpers",
    "velora",
    "riemannian_lora",
]
# What PEFT's tests import beside our dependencies.
EXTRAS = ("attrs==25.4.0", "parameterized==0.9.0")
# Only tests that download a model use more of it.
DIFFUSERS = (
    '__version__ = "0.40.0"\n\n\nclass AutoModel: ...\n\n\nclass StableDiffusionPipeline: ...\n'
)
INI = """[pytest]
markers =
    single_gpu_tests
    multi_gpu_tests
    regression
    bitsandbytes
filterwarnings =
    error::DeprecationWarning:transformers
    ignore:.*BPE.__init__ will not create from files anymore.*:DeprecationWarning:transformers
"""
# The distribution has no conftest.py. In this one the hub is never online, not even for the tests
# that would have it so: they fail at once, and do not try to connect for a minute.
CONFTEST = """from contextlib import nullcontext

from . import testing_utils

testing_utils.hub_online_once = nullcontext
"""
# Where the README and accelerate themselves say that PEFT's own forward runs.
EXCUSED = (
    "DoRA with several adapters",
    "dropout with several adapters",
    "several VeRA adapters",
    "torch.compile",
    "torch.jit tracing",
    "torch.func transform",
    "global module hooks",
)
# The last one: parameters of modules that are no experts.
EXCUSED_PREFIXES = ("hooks on ", "forward of ", "Linear holds no experts")
ARMS = ("stock", "accelerated")


@dataclass(frozen=True)
class Arm:
    """The tests of one run by their id, each with outcome, error and calls."""

    name: str
    tests: dict[str, dict[str, Any]]
    seconds: float

    def outcomes(self) -> Counter[str]:
        return Counter(test["outcome"] for test in self.tests.values())


def prepared() -> Path:
    """The folder with PEFT's tests and what they need; made at the first call.

    Raises CalledProcessError if PyPI cannot be reached then.
    """
    work = Path(sys.prefix) / f"peft-suite-{version('peft')}"
    if not work.is_dir():
        # At once or not at all, though it be interrupted or done twice at a time.
        with tempfile.TemporaryDirectory(dir=sys.prefix) as folder:
            filled = Path(folder) / "work"
            filled.mkdir()
            _fill(filled)
            if not work.is_dir():
                filled.rename(work)
    return work


def _fill(work: Path) -> None:
    peft = f"peft=={version('peft')}"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    sdist = ["--no-deps", "--no-binary", "peft", "--no-build-isolation", "--dest", str(work), peft]
    subprocess.run([*pip, "download", *sdist], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(work), *EXTRAS], check=True)
    (archive,) = work.glob("peft-*.tar.gz")
    tests = work / "tests"
    tests.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 3 and parts[1] == "tests":
                # Not by extract: it warns without a filter, which early versions of 3.11 lack.
                (tests / parts[2]).write_bytes(tar.extractfile(member).read())
    (tests / "__init__.py").touch()
    (tests / "conftest.py").write_text(CONFTEST)
    (work / "diffusers").mkdir()
    (work / "diffusers" / "__init__.py").write_text(DIFFUSERS)


def run_arm(name: str, out: Path, files: list[str], jobs: int, extra: list[str]) -> Arm:
    """Run the tests of `files`, with what they leave in `out`; exits if pytest itself broke."""
    work, left = prepared(), out / f"{name}.json"
    if not (out / "hub").exists():
        save_models(out / "hub")
    (work / "pytest.ini").write_text(INI)
    command = [
        *(sys.executable, "-m", "pytest", "-q", "--tb", "no", "-n", str(jobs)),
        *("-p", "peft_suite_plugin", "-p", "no:cacheprovider", "-p", "no:benchmark"),
        *("--timeout", "300", "--disable-warnings"),
        *(*(f"tests/test_{file}.py" for file in files), *extra),
    ]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (work, HERE, ROOT))),
        "PEFT_SUITE_ARM": name,
        "PEFT_SUITE_OUT": str(left),
        "HF_HOME": str(out / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    print(f"== {name}", flush=True)
    started = time.monotonic()
    code = subprocess.run(command, cwd=work, env=env, check=False).returncode
    if code not in (0, 1) or not left.is_file():
        sys.exit(f"pytest ended with {code} in the {name} run")
    return Arm(name, json.loads(left.read_text()), time.monotonic() - started)


def changes(stock: Arm, accelerated: Arm) -> list[str]:
    """The tests whose outcome, or the error that they fail with, is not the same in both."""
    found = []
    for test in sorted(stock.tests.keys() | accelerated.tests.keys()):
        before, after = (arm.tests.get(test) for arm in (stock, accelerated))
        if before is None or after is None:
            found.append(f"{test}: ran in one of the runs only")
        elif before["outcome"] != after["outcome"]:
            found.append(f"{test}: {before['outcome']} → {after['outcome']}: {after['error']}")
        elif _kind_of(before["error"]) != _kind_of(after["error"]):
            found.append(f"{test}: {before['error']} → {after['error']}")
    return found


def calls_of(arm: Arm) -> Counter[tuple[str, bool, str, str]]:
    """How often a layer of a kind, (kind, claimed, how, reason), was called."""
    total: Counter[tuple[str, bool, str, str]] = Counter()
    for test in arm.tests.values():
        for kind, claimed, how, reason, count in test["calls"]:
            total[kind, claimed, how, reason] += count
    return total


def broken_promises(arm: Arm) -> list[str]:
    """Calls that the README promises to run fused and that did not, by test."""
    found = []
    for name, test in arm.tests.items():
        for kind, claimed, how, reason, count in test["calls"]:
            if claimed and how == "fallback" and not _excused(reason):
                found.append(f"{name}: {count} × {kind}: {reason}")
    return found


def summary(stock: Arm, accelerated: Arm) -> str:
    """Both runs side by side, then the calls."""
    lines = [f"{'':12}{'stock':>12}{'accelerated':>14}"]
    counts = {arm.name: arm.outcomes() for arm in (stock, accelerated)}
    for outcome in sorted(counts["stock"] | counts["accelerated"]):
        lines.append(
            f"{outcome:12}{counts['stock'][outcome]:12}{counts['accelerated'][outcome]:14}"
        )
    lines.append(f"{'seconds':12}{stock.seconds:12.0f}{accelerated.seconds:14.0f}")
    calls = calls_of(accelerated)
    for title, claimed in (("calls promised fused", True), ("all other calls", False)):
        chosen = {key: n for key, n in calls.items() if key[1] is claimed}
        total = sum(chosen.values())
        fused = sum(n for key, n in chosen.items() if key[2] == "fused")
        share = f" ({100 * fused / total:.2f}%)" if total else ""
        lines += ["", f"{title}: {fused} of {total} ran fused{share}"]
        by_kind: Counter[tuple[str, str]] = Counter()
        for (kind, _, how, reason), n in chosen.items():
            text = {"fused": "fused", "raised": f"raised as in PEFT, {reason or 'fused'}"}
            by_kind[kind, text.get(how, reason)] += n
        lines += [f"  {n:8} × {kind}: {text}" for (kind, text), n in by_kind.most_common()]
    return "\n".join(lines)


def verdict(stock: Arm, accelerated: Arm) -> list[str]:
    """All failures."""
    found = changes(stock, accelerated) + broken_promises(accelerated)
    if not any(how == "fused" for _, _, how, _ in calls_of(accelerated)):
        found.append("no call ran fused")
    if not stock.outcomes()["passed"]:
        found.append("no test passed")
    return found


def _excused(reason: str) -> bool:
    return reason in EXCUSED or reason.startswith(EXCUSED_PREFIXES)


def _kind_of(error: str) -> str:
    """The class of an exception; its message may hold addresses and numbers."""
    return error.split(":")[0].split("(")[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="worker processes (default 2)")
    parser.add_argument("--files", nargs="+", default=FILES, help="of PEFT's tests/test_*.py")
    options, extra = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        stock, accelerated = (
            run_arm(name, Path(folder), options.files, options.jobs, extra) for name in ARMS
        )
    print(summary(stock, accelerated))
    problems = verdict(stock, accelerated)
    for problem in problems:
        print(f"FAILED {problem}")
    print(f"{len(problems)} problems in {len(stock.tests)} tests", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
