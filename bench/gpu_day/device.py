"""The device: its name and its clocks.

python -m bench.gpu_day.device [--rehearse]   name and versions as one line of JSON
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .steps import STUB_ARCH

if TYPE_CHECKING:
    from .day import Day

_ROOT = Path(__file__).resolve().parents[2]
_VERSIONS = ("triton", "bitsandbytes", "peft", "transformers", "liger_kernel", "unsloth")
_LONGEST_ANSWER = 10.0
_CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "pstate")


def about(*, rehearse: bool) -> dict[str, Any]:
    """The device and versions that results belong to; {"missing": …} without a GPU."""
    if rehearse:
        arch = os.environ.get(STUB_ARCH)
        name = f"no GPU, compiled for sm_{arch}" if arch else "no GPU"
        found: dict[str, Any] = {"name": name, "capability": [*divmod(int(arch or 90), 10)]}
    elif not torch.cuda.is_available():
        return {"missing": f"a CUDA device: torch {torch.__version__} sees none"}
    else:
        properties = torch.cuda.get_device_properties(0)
        found = {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": _nvidia_smi(("driver_version",)),
        }
    return {
        **found,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in _VERSIONS},
        "LORA_FAST_DESCRIPTORS": os.environ.get("LORA_FAST_DESCRIPTORS"),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    """The version, without importing the package: importing Unsloth changes transformers."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=_ROOT, capture_output=True, text=True
    )
    return asked.stdout.strip() or None


def _nvidia_smi(fields: tuple[str, ...]) -> list[str] | None:
    process = start_nvidia_smi(fields)
    return None if process is None else read_nvidia_smi(process)


def start_nvidia_smi(fields: tuple[str, ...] = _CLOCKS) -> subprocess.Popen[str] | None:
    """Query without waiting, so that the device can be kept busy; None: not installed."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    return subprocess.Popen(
        ["nvidia-smi", *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def read_nvidia_smi(process: subprocess.Popen[str]) -> list[str] | None:
    """The answers, in the order of the fields; None if there is none."""
    try:
        out, _ = process.communicate(timeout=_LONGEST_ANSWER)
    except subprocess.TimeoutExpired:
        process.kill()
        return None
    return [part.strip() for part in out.split(",")] if process.returncode == 0 else None


def clocks_under(step: Any, day: Day) -> dict[str, str] | None:
    """Clocks, temperature and power while ``step`` runs again and again."""
    process = start_nvidia_smi()
    if process is None:
        return None
    until = time.monotonic() + _LONGEST_ANSWER
    while process.poll() is None and time.monotonic() < until:
        step()
        torch.cuda.synchronize(day.device)
    answers = read_nvidia_smi(process)
    return None if answers is None else dict(zip(_CLOCKS, answers, strict=False))


if __name__ == "__main__":
    print(json.dumps(about(rehearse="--rehearse" in sys.argv[1:])))
