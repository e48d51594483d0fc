"""JSON files that are there as a whole or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def write_json(value: Any, path: Path) -> None:
    """Write ``value``, with None for NaN and infinity, in one piece, whatever interrupts it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(finite(value), indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)


def finite(value: Any) -> Any:
    """Return ``value`` with every NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
