"""Untrusted files, read with checks: safetensors and JSON inside one folder."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

CONFIG = "config.json"
# Files of a tokenizer or processor, which are copied; weights and cards are not.
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
    "LICENSE*",
)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}


class Entry(NamedTuple):
    """A tensor as the header of a file describes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`.

    Symbolic links may point to the blobs of the same repository in Hugging Face's cache, and
    nowhere else outside `folder`.

    Raises ValueError: `name` leads out of `folder`, or there is no such file.
    """
    path = folder / name
    resolved, home = (Path(os.path.realpath(place)) for place in (path, folder))
    blobs = home.parent.parent / "blobs"
    cached = home.parent.name == "snapshots" and resolved.is_relative_to(blobs)
    plain = not Path(name).is_absolute() and ".." not in Path(name).parts
    if not plain or not (resolved.is_relative_to(home) or cached):
        raise ValueError(f"files must lie inside {folder}, got {name!r}")
    if not resolved.is_file():
        raise ValueError(f"{folder} must hold {name}, got no such file")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of `folder`. ValueError: it is absent or holds no object."""
    path = inside(folder, name)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON, got: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


class TensorFiles:
    """The tensors of some safetensors files: headers at once, each tensor on demand.

    A context manager; the files stay open, mapped, inside the block.

    Raises ValueError for a file that is truncated or not safetensors, for a name in two files, and
    for a type that torch does not have.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.header: dict[str, Entry] = {}
        self._paths = [inside(folder, name) for name in names]
        self._where: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> TensorFiles:
        with ExitStack() as undo:
            undo.enter_context(self._stack)
            for path in self._paths:
                self._open(path)
            undo.pop_all()
        return self

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} must be a whole safetensors file, got: {error}") from error
        for key in file.keys():  # noqa: SIM118 - it is no dictionary
            if key in self._where:
                raise ValueError(f"{path} must not repeat {key}, which another file holds")
            part = file.get_slice(key)
            kind = part.get_dtype()
            if kind not in _DTYPES:
                raise ValueError(f"{path}: {key} must have a type that torch has, got {kind}")
            self._where[key] = file
            self.header[key] = Entry(tuple(part.get_shape()), _DTYPES[kind])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def tensor(self, key: str) -> Tensor:
        """The tensor, read from its file."""
        found: Tensor = self._where[key].get_tensor(key)
        return found


def checkpoint_files(folder: Path) -> list[str]:
    """The safetensors files of a model in `folder`, in the order of its index.

    Raises ValueError: there are none, or the index is invalid.
    """
    if (folder / INDEX).is_file():
        weight_map = read_json(folder, INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise ValueError(f"{folder / INDEX} must hold a weight_map of file names")
        return sorted(set(weight_map.values()))
    if (folder / SINGLE).is_file():
        return [SINGLE]
    raise ValueError(
        f"{folder} must hold {SINGLE} or {INDEX}, got neither: only safetensors are read, save the "
        "model with save_pretrained(safe_serialization=True)"
    )
