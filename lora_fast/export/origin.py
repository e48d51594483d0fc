"""The origin of an adapter, from its folder: its base model, its classes, its padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files.adapter_files import CONFIG
from ..files.fingerprint import weights_fingerprint
from ..files.model_source import cached_folder, resolve_model
from ..files.run_files import stored_record
from ..files.safe_files import read_json


def other_base(adapter: Path, base: str, folder: Path) -> str | None:
    """A line of warning if the base, in `folder`, is not the one the adapter was trained on.

    Decided by what ``lora-fast train`` recorded, or by the weights of the base that the adapter
    names if they are on this machine, else by its name. None if nothing contradicts.
    """
    named = read_json(adapter, CONFIG) if (adapter / CONFIG).is_file() else {}
    name = named.get("base_model_name_or_path")
    recorded = _recorded_weights(adapter)
    if recorded is None and isinstance(name, str) and name:
        origin = cached_folder(resolve_model(name))
        if origin is not None and origin.resolve() == folder.resolve():
            return None
        recorded = weights_fingerprint(origin) if origin is not None else None
    here = weights_fingerprint(folder)
    if recorded is not None and here is not None:
        if recorded == here:
            return None
        trained_on = f", {name}" if name else ""
        return (
            f"the weights of {base} are not those that the adapter was trained on{trained_on}: is "
            "it the base that you mean?"
        )
    if not isinstance(name, str) or not name or Path(name).name == Path(base).name:
        return None
    return f"the adapter names another base, {name}: is {base} the one that you mean?"


def _recorded_weights(adapter: Path) -> str | None:
    model = _inputs(adapter).get("model")
    found = model.get("weights") if isinstance(model, dict) else None
    return found if isinstance(found, str) else None


def _inputs(adapter: Path) -> dict[str, Any]:
    found = stored_record(adapter).get("inputs")
    return found if isinstance(found, dict) else {}


def complete_classifier(config: Any, adapter: Path) -> None:
    """Add class names and padding to the config of a classifier, if ``lora-fast train`` recorded
    them: without, it accepts no batches and predicts LABEL_0."""
    data = _inputs(adapter).get("data")
    found = data.get("labels") if isinstance(data, dict) else None
    labels = found if isinstance(found, list) else []
    if len(labels) == config.num_labels and all(isinstance(name, str) for name in labels):
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: index for index, name in enumerate(labels)}
    padding = stored_record(adapter).get("pad_token_id")
    if config.pad_token_id is None and type(padding) is int:
        config.pad_token_id = padding
