"""Everything that needs a GPU, in one command: tests, accuracy, benchmarks, a training run.

    python bench/gpu.py [--fresh] [--only STEP] [--out FILE]

The suite that needs no GPU runs first, on the machine that has one, then what a GPU alone can run.
Results go to bench/results/<device>.json. Each step has a time limit; steps with a result there are
skipped, so an interrupted run can be started again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.device_label import label  # noqa: E402 - needs the path
from bench.steps import Step, run_steps  # noqa: E402

PYTHON = sys.executable
TRAIN = (PYTHON, "-m", "lora_fast.cli.app", "train")
STEPS = (
    Step("suite", (PYTHON, "tests/run.py", "--json", "{json}"), 1500),
    Step(
        "tests",
        (PYTHON, "tests/run.py", "--leg", "gpu", "--jobs", "1", "--json", "{json}"),
        900,
    ),
    Step("accuracy", (PYTHON, "-m", "bench.accuracy_table", "--json", "{json}"), 600),
    Step("linear", (PYTHON, "-m", "bench.linear", "--json", "{json}"), 600),
    Step("llama_layer", (PYTHON, "-m", "bench.llama_layer", "--json", "{json}"), 300),
    Step(
        "training",
        (*TRAIN, "--compare", "--steps", "100", "--out", "{folder}"),
        600,
        result="metrics.json",
    ),
)


def about(device: torch.device) -> dict[str, Any]:
    """What the results belong to."""
    import bitsandbytes
    import triton

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    properties = torch.cuda.get_device_properties(device)
    return {
        "label": label(device),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "commit": commit.stdout.strip() or None,
    }


def file_name(device_name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` → ``nvidia-h100-80gb-hbm3.json``."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="run every step again")
    names = [step.name for step in STEPS]
    parser.add_argument("--only", action="append", choices=names, help="this step (repeatable)")
    parser.add_argument("--out", type=Path, help="default bench/results/<device>.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"make gpu needs a CUDA device; torch {torch.__version__} sees none", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    path = options.out or ROOT / "bench" / "results" / file_name(torch.cuda.get_device_name(device))
    chosen = [step for step in STEPS if not options.only or step.name in options.only]
    return 0 if run_steps(chosen, path, about(device), ROOT, fresh=options.fresh) else 1


if __name__ == "__main__":
    sys.exit(main())
