"""Finding the checkpoint to resume from, whatever ended the run before."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"
ARMS = ("stock", "lora_fast")
STATE = "trainer_state.json"
WEIGHTS = "trained.safetensors"
NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state.pth", WEIGHTS)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint in ``folder``, None without one.

    Trainer writes ``trainer_state.json`` last. A folder where it is absent or cut off belongs to a
    run that was killed while it wrote, and the checkpoint before it counts.
    """
    numbered = []
    for path in folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            numbered.append((int(match[1]), path))
    return next((path for _, path in sorted(numbered, reverse=True) if is_complete(path)), None)


def is_complete(checkpoint: Path) -> bool:
    """Whether Trainer finished writing ``checkpoint``."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError):
        return False
    return "global_step" in state and all((checkpoint / name).is_file() for name in NEEDED)


def step_of(checkpoint: Path) -> int:
    """Return the number of finished steps that ``checkpoint`` holds."""
    return int(checkpoint.name.rpartition("-")[2])


def stored_state(checkpoint: Path | None) -> dict[str, Any]:
    """Return Trainer's state as ``checkpoint`` holds it, empty without a checkpoint."""
    if checkpoint is None:
        return {}
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    return state


def stored_attributes(checkpoint: Path | None, callback: str) -> dict[str, Any]:
    """Return what ``checkpoint`` holds of a callback, by the name of its class."""
    found = stored_state(checkpoint).get("stateful_callbacks", {}).get(callback, {})
    attributes: dict[str, Any] = (found[0] if isinstance(found, list) else found).get(
        "attributes", {}
    )
    return attributes


def latest_step(out: Path) -> int | None:
    """Return the last step that any arm of the run in ``out`` has saved, None without one."""
    found = map(latest_checkpoint, (out / CHECKPOINTS).glob("*"))
    return max((step_of(checkpoint) for checkpoint in found if checkpoint), default=None)
