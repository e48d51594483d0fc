"""The files of a model: its weights in shards, and copied files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files.json_files import write_json
from ..files.safe_files import INDEX, Entry

PATTERN = "model{suffix}.safetensors"


def write_shards(
    folder: Path,
    entries: Mapping[str, Entry],
    make: Callable[[str], Tensor],
    max_shard_size: int,
) -> None:
    """Write the tensors that `entries` names and describes, one shard at a time.

    `max_shard_size` is in bytes. ``make(name)`` is called once for each, in the order of the files;
    no more than one shard's tensors are alive at a time. Several shards get
    ``model.safetensors.index.json``.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    split = split_state_dict_into_shards_factory(
        dict(entries),
        get_storage_size=_entry_bytes,
        filename_pattern=PATTERN,
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: make(name) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        files = dict(sorted(split.tensor_to_filename.items()))
        write_json({"metadata": split.metadata, "weight_map": files}, folder / INDEX)


def copy_files(folder: Path, patterns: Iterable[str], to: Path) -> None:
    """Copy matching files of `folder` that do not exist yet; links become files."""
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and not (to / path.name).exists():
                shutil.copyfile(path, to / path.name)


def _entry_bytes(entry: Any) -> int:
    total = entry.dtype.itemsize
    for size in entry.shape:
        total *= size
    return int(total)
