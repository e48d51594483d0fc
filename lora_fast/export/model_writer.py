"""A model folder that is there as a whole or not at all.

Everything is written to ``.NAME.merging`` beside the folder NAME, which is renamed when all is on
the disk. A writer that is killed leaves that folder behind; the next one takes it over. A lock on
it, which ends with the process, keeps two writers apart.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .safe_files import INDEX, Entry

PATTERN = "model{suffix}.safetensors"


class WholeFolder:
    """Context manager: ``path`` inside the block is where to write; at its end it becomes `out`.

    Raises:
        FileExistsError: `out` is there, not empty, and must not be replaced.
        BlockingIOError: another process is writing the same folder.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        self.out = Path(os.path.abspath(out))
        self.overwrite = overwrite
        self.path = self.out.with_name(f".{self.out.name}.merging")
        self._old = self.out.with_name(f".{self.out.name}.replaced")
        self._lock: int | None = None

    def __enter__(self) -> WholeFolder:
        self._refuse_to_replace()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path)
        try:
            for left in self.path.iterdir():
                _remove(left)
            if self._old.exists() and not self.out.exists():
                os.replace(self._old, self.out)  # killed between the two renames of _publish
                self._refuse_to_replace()
        except BaseException:
            self._give_up()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._give_up()
            return
        try:
            self._publish()
        finally:
            self._unlock()

    def _give_up(self) -> None:
        try:
            _remove(self.path)
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _refuse_to_replace(self) -> None:
        if not self.overwrite and self.out.exists() and any(self.out.iterdir()):
            raise FileExistsError(f"out must be a new or empty folder, got {self.out}")

    def _publish(self) -> None:
        for path in (*self.path.rglob("*"), self.path):
            _flush(path)
        if self.out.exists() and any(self.out.iterdir()):
            _remove(self._old)
            os.replace(self.out, self._old)
        os.replace(self.path, self.out)
        _flush(self.out.parent)
        _remove(self._old)


def write_shards(
    folder: Path,
    entries: Mapping[str, Entry],
    make: Callable[[str], Tensor],
    max_shard_size: str | int,
) -> None:
    """Write the tensors that `entries` names and describes, one shard at a time.

    ``make(name)`` is called once for each, in the order of the files; no more than one shard's
    tensors are alive at a time. Several shards get ``model.safetensors.index.json``.
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
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)


def write_json(path: Path, value: Any) -> None:
    """Write `value`, readable."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_files(folder: Path, patterns: Iterable[str], to: Path) -> None:
    """Copy the files of `folder` that match, and that are not there yet; links become files."""
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and not (to / path.name).exists():
                shutil.copyfile(path, to / path.name)


def _entry_bytes(entry: Any) -> int:
    total = entry.dtype.itemsize
    for size in entry.shape:
        total *= size
    return int(total)


def _locked(folder: Path) -> int:
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The writer before may just have given the folder its name, and let go of it.
        if not folder.exists() or os.stat(folder).st_ino != os.fstat(handle).st_ino:
            raise BlockingIOError
    except BlockingIOError:
        os.close(handle)
        raise BlockingIOError(f"another merge is writing {folder.name} at this moment") from None
    return handle


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
