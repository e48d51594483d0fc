"""Finding the checkpoint to resume from, however the previous run ended."""

from __future__ import annotations

import functools
import json
import re
import zipfile
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"
ARMS = ("stock", "lora_fast")
STATE = "trainer_state.json"
WEIGHTS = "trained.safetensors"
NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state.pth", WEIGHTS)


def latest_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint in ``folder``, None without one.

    Trainer writes ``trainer_state.json`` last. If it is absent or truncated, the run was killed
    while it wrote, and the checkpoint before that one is used.
    """
    return next((path for path in _newest_first(folder) if damage(path) is None), None)


def damaged_checkpoints(folder: Path) -> dict[str, str]:
    """The checkpoints that are newer than the last complete one, and what each lacks."""
    found = {}
    for path in _newest_first(folder):
        lack = damage(path)
        if lack is None:
            break
        found[path.name] = lack
    return found


def damage(checkpoint: Path) -> str | None:
    """The file that is absent, truncated or damaged in ``checkpoint``, None if all are fine.

    torch's files are archives with checksums; safetensors has the sizes of its tensors.
    """
    for name in (STATE, *NEEDED):
        try:
            whole = _is_whole(checkpoint / name)
        except (OSError, ValueError, zipfile.BadZipFile):
            whole = False
        if not whole:
            return name
    return None


def _newest_first(folder: Path) -> list[Path]:
    numbered = []
    for path in folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            numbered.append((int(match[1]), path))
    return [path for _, path in sorted(numbered, reverse=True)]


def _is_whole(path: Path) -> bool:
    status = path.stat()
    return _checked(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _checked(path: Path, size: int, changed: int) -> bool:
    """Whether the file of that size and time is complete; cached, so that it is read once."""
    if path.name == STATE:
        return "global_step" in json.loads(path.read_text())
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                return False
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        return size == 8 + length + max(ends, default=0)
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is None


def step_of(checkpoint: Path) -> int:
    """The number of finished steps that ``checkpoint`` holds."""
    return int(checkpoint.name.rpartition("-")[2])


def stored_state(checkpoint: Path | None) -> dict[str, Any]:
    """Trainer's state as ``checkpoint`` holds it, empty without a checkpoint."""
    if checkpoint is None:
        return {}
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    return state


def stored_attributes(checkpoint: Path | None, callback: str) -> dict[str, Any]:
    """The state of a callback in ``checkpoint``, by the name of its class."""
    found = stored_state(checkpoint).get("stateful_callbacks", {}).get(callback, {})
    attributes: dict[str, Any] = (found[0] if isinstance(found, list) else found).get(
        "attributes", {}
    )
    return attributes


def latest_step(out: Path) -> int | None:
    """The last step that any arm of the run in ``out`` has saved, None without one."""
    found = map(latest_checkpoint, (out / CHECKPOINTS).glob("*"))
    return max((step_of(checkpoint) for checkpoint in found if checkpoint), default=None)
