"""``run.json``, which a run of ``lora-fast train`` writes and other commands read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG_FILE = "run.json"
# The key under which a run records facts beside its options.
RECORD = "record"


def stored_record(out: Path) -> dict[str, Any]:
    """What the run in ``out`` has recorded beside its options."""
    try:
        found = json.loads((out / CONFIG_FILE).read_text()).get(RECORD)
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}
