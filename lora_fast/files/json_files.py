"""JSON files that are written completely or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

PARTIAL = ".partial"


def write_json(value: Any, path: Path) -> None:
    """Write ``value`` atomically, with None for NaN and infinity.

    A killed process may leave the file NAME + PARTIAL behind, which the next one replaces.
    """
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(json.dumps(finite(value), indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)


def finite(value: Any) -> Any:
    """``value`` with None for NaN and infinity, which JSON cannot represent."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
