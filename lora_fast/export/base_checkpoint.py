"""A base model on disk: its config, its tensors under the names that the loaded model has."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import first_line
from ..files.model_source import check_hub
from ..files.safe_files import COMPANIONS, CONFIG, Entry, TensorFiles, checkpoint_files
from ..four_bit.decoding import absmax_of, decode

_STATE = re.compile(r"^(.+)\.quant_state\.bitsandbytes__(\w+)$")
_CONSTANTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def base_folder(name: str) -> Path:
    """The folder of a base model, from the local cache or downloaded for a hub id.

    Raises ValueError: there is no such folder, and the model cannot be downloaded.
    """
    from ..files.model_source import resolve_model

    path = Path(resolve_model(name))
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")):
        raise ValueError(f"base must be a folder or a hub id, got {name}: no such folder")
    from huggingface_hub import snapshot_download

    patterns = [CONFIG, "*.safetensors", "*.safetensors.index.json", *COMPANIONS]
    problem: Exception | None = None
    for local in (True, False):
        try:
            if not local:
                check_hub(name)
            found = snapshot_download(name, allow_patterns=patterns, local_files_only=local)
            checkpoint_files(Path(found))
            return Path(found)
        except Exception as error:  # an invalid name, no connection, an incomplete download
            problem = error
    assert problem is not None
    raise ValueError(
        "base must be a folder, or a hub id that is in the local cache or can be downloaded, got "
        f"{name!r}: {first_line(problem)}"
    ) from problem


class Part(NamedTuple):
    """What a tensor of a checkpoint is of the weight [E, N, K] that transformers makes of it.

    of: the name of that weight · expert: whose, None if it is put together in another way · piece
    of pieces: which of equal parts of the rows.
    """

    of: str
    expert: int | None = None
    piece: int = 0
    pieces: int = 1


class Weights:
    """The tensors of a checkpoint, 4-bit ones decoded, by their names in `model`.

    ``header`` has the shape and dtype of each as :meth:`tensor` returns it; ``stored`` its name in
    the file. A weight that transformers would assemble from several tensors keeps its stored names,
    by which ``assembled`` has the parts.
    """

    def __init__(self, files: TensorFiles, model: nn.Module) -> None:
        self._files = files
        self._states: set[str] = set()
        for key in files.header:
            found = _STATE.match(key)
            if found:
                self._states.add(found[1])
        parts = {f"{weight}.{part}" for weight in self._states for part in _CONSTANTS} | {
            key for key in files.header if _STATE.match(key)
        }
        plain = [key for key in files.header if key not in parts]
        self.stored, self.assembled = _names(plain, model)
        self.header = {name: self._entry(key) for name, key in self.stored.items()}

    def tensor(self, name: str) -> Tensor:
        """The values of a tensor; a 4-bit weight is decoded by the formula of its format."""
        key = self.stored[name]
        if key not in self._states:
            return self._files.tensor(key)
        packed, state = self._files.tensor(key).view(torch.uint8).view(-1), self._quant_state(key)
        absmax, blocksize = absmax_of(state), int(state.blocksize)
        return decode(packed, absmax, blocksize, state.quant_type, state.dtype, state.shape)

    def _entry(self, key: str) -> Entry:
        if key not in self._states:
            return self._files.header[key]
        state = self._quant_state(key)
        return Entry(tuple(state.shape), state.dtype)

    def _quant_state(self, key: str) -> Any:
        from bitsandbytes.functional import QuantState

        prefix = f"{key}."
        names = [name for name in self._files.header if name.startswith(prefix)]
        parts = {name.removeprefix(prefix): self._files.tensor(name) for name in names}
        return QuantState.from_dict(parts, device=torch.device("cpu"))


def _names(keys: Iterable[str], model: Any) -> tuple[dict[str, str], dict[str, Part]]:
    """({name in the model: name in the file}, parts of a weight by their names)."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    prefix = getattr(model, "base_model_prefix", "")
    renamed = _renamer(model)
    names: dict[str, str] = {}
    assembled: dict[str, Part] = {}
    for key in keys:
        name, part = renamed(key)
        shorter = name.removeprefix(f"{prefix}.") if prefix else name
        for candidate in (name, shorter, f"{prefix}.{name}"):
            if candidate in own:
                name = candidate
                break
        if part is not None:
            assembled[key] = part._replace(of=name)
            name = key
        names[name] = key
    return names, assembled


def _renamer(model: Any) -> Any:
    """How transformers renames the tensors of a checkpoint when it loads this kind of model."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:  # before transformers 5, names in files are those of the model
        return lambda key: (key, None)
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]

    def renamed(key: str) -> tuple[str, Part | None]:
        name, pattern = rename_source_key(key, renamings, converters)
        return name, None if pattern is None else _part(key, name, pattern, converters)

    return renamed


def _part(key: str, name: str, pattern: str, converters: list[Any]) -> Part:
    """Experts one after the other, each perhaps of gate and up: what most files hold."""
    converter = next(c for c in converters if pattern in c.source_patterns)
    made_by = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    numbers = re.findall(r"\.(\d+)\.", key)
    if made_by[:1] != [("MergeModulelist", 0)] or made_by[1:] not in ([], [("Concatenate", 1)]):
        return Part(name)
    pieces = converter.source_patterns if made_by[1:] else [pattern]
    return Part(name, int(numbers[-1]), pieces.index(pattern), len(pieces))
