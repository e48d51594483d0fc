"""The versions of constraints.txt."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

CONSTRAINTS = (Path(__file__).resolve().parents[2] / "constraints.txt").read_text()
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", CONSTRAINTS, re.MULTILINE))


def is_pinned(package: str) -> bool:
    """Whether the version of `package` is that of constraints.txt."""
    return importlib.metadata.version(package) == PINS[package]
