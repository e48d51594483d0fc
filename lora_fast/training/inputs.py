"""Digests of a run's inputs, its examples and its base model, which resuming compares."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..errors import TrainingError
from ..files.fingerprint import weights_fingerprint
from ..files.model_source import cached_folder, resolve_model
from .config import TrainConfig, option_name
from .data import Rows
from .rows import Row

Inputs = dict[str, Any]


def inputs_of(config: TrainConfig, rows: Rows) -> Inputs:
    """A digest of each input by the name of its option, as ``run.json`` keeps them.

    Examples are digested as they were parsed, not as the bytes of their file. None for a base whose
    weights are not in safetensors, or not on this machine.
    """
    sides = {"data": rows.train, "eval_data": rows.held_out}
    if config.eval_data is None:
        sides = {"data": [*rows.train, *rows.held_out]}
    found: Inputs = {name: _digest(side, rows.labels) for name, side in sides.items()}
    folder = cached_folder(resolve_model(config.model))
    found["model"] = {"weights": weights_fingerprint(folder) if folder else None}
    return found


def changed(before: Inputs, now: Inputs, config: TrainConfig, given: set[str]) -> dict[str, str]:
    """The inputs that differ from ``before``, by option, and what differs.

    Those in ``given`` were given explicitly when the run was resumed.

    Raises TrainingError: an input has changed that was not given, or the labels have.
    """
    found = {}
    value: Any
    for name, value in now.items():
        old: Any = before.get(name, value)
        if value == old:
            continue
        option = f"{option_name(name)} {getattr(config, name)}"
        if name == "model":
            what = "other weights than when the run began"
        elif value["labels"] != old["labels"]:
            raise TrainingError(
                f"{option}: its labels are other ones than when the run began: start another run"
            )
        else:
            counts = f"{old['count']} then, {value['count']} now"
            what = f"other examples than when the run began ({counts})"
        if name not in given:
            raise TrainingError(
                f"{option}: {what}; put the old ones back, or repeat {option_name(name)} beside "
                "--resume to continue anyway"
            )
        found[option_name(name)] = what
    return found


def _digest(rows: list[Row], labels: list[str]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return {"count": len(rows), "sha256": digest.hexdigest(), "labels": labels}
