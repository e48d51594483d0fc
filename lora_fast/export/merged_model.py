"""A base model with an adapter merged into it, written shard by shard."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import some
from ..files.adapter_files import CHANGED, CONFIG, WEIGHTS, adapt, adapter_config, check_header
from ..files.safe_files import COMPANIONS, Entry, TensorFiles, checkpoint_files
from ..files.whole_folder import WholeFolder
from ..skeleton import load_config, skeleton
from .base_checkpoint import Part, Weights, base_folder
from .changes import Change, Changes, changes_of
from .model_writer import copy_files, write_shards
from .origin import complete_classifier, other_base
from .ties import parted, shared_names, untied

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FLOATING = (*DTYPES.values(), torch.float64)
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
)
HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight", "qa_outputs.weight")
TASKS = {
    "SEQ_CLS": "classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}
Progress = Callable[[int, int], None]


def merge_checkpoint(
    base: str,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
    note: Callable[[str], None] = warnings.warn,
) -> Path:
    """Write to the folder `out` the model `base` with `adapter` merged into it; returns `out`.

        W' = round( g ⊙ (W + s · (b ⊙ (B d)) A) )                         in float32, rounded once

    `base`: a folder or a hub id, 16-bit, float32 or 4-bit (bitsandbytes); 4-bit weights are decoded
    first. `adapter`: a folder with PEFT's LoRA, rsLoRA, DoRA, LoRA+, LoRA-FA, VeRA, AdaLoRA, (IA)³
    or LayerNorm tuning, on layers or (LoRA) on experts, or what ``lora-fast train`` wrote for a
    method that trains weights of the base (Delta-LoRA, BitFit, linear probing). `dtype`: bfloat16,
    float16 or float32, by default that of each tensor of the base. Tensors are read, merged and
    written shard by shard, at most
    `max_shard_size` at a time: bytes, or a size such as ``5GB`` or ``500MiB``.

    `out` appears once it is complete; an interrupted merge leaves nothing there, and merging again
    cleans up. With `overwrite`, `out` may hold a model, which stays until the new one replaces it;
    nothing else is ever deleted. ``progress(done, total)`` counts bytes, and ``note(line)`` gets
    what the user should know.

    Weights that the base ties and that the adapter gives different values are written one by one,
    and the config says so: ``tie_word_embeddings`` is false then.

    Raises ValueError for files that do not fit together or are no safetensors, and for an `out`
    that is, contains or lies in `base` or `adapter`, or that is to be replaced and holds anything
    but a model, before anything is written; NotImplementedError for adapters that have no such
    formula; FileExistsError for an `out` with something in it, unless `overwrite`.
    """
    wanted, shard_bytes = _dtype(dtype), _shard_bytes(max_shard_size)
    adapter_path, base_path = Path(adapter), base_folder(base)
    if not adapter_path.is_dir():
        raise ValueError(f"adapter must be a folder, got {adapter}")
    whole = WholeFolder(Path(out), overwrite=overwrite, base=base_path, adapter=adapter_path)
    with ExitStack() as stack:
        files = stack.enter_context(TensorFiles(base_path, checkpoint_files(base_path)))
        merging = _Merging(base_path, adapter_path, files, wanted, stack)
        doubt = other_base(adapter_path, base, base_path)
        for line in [*([doubt] if doubt else []), *merging.notes]:
            note(line)
        with whole as folder:
            merging.config.save_pretrained(folder.path)
            copy_files(adapter_path, TOKENIZER, folder.path)
            copy_files(base_path, COMPANIONS, folder.path)
            write_shards(folder.path, merging.entries, _told(merging, progress), shard_bytes)
    return Path(out)


class _Merging:
    """Everything known before a tensor is read: names, shapes, dtypes and the changes.

    ``entries`` describes the files to write, by the names in them.
    """

    def __init__(
        self,
        base: Path,
        adapter: Path,
        files: TensorFiles,
        dtype: torch.dtype | None,
        stack: ExitStack,
    ) -> None:
        config = load_config(base)
        _unquantised(config, base)
        held = _adapter_files(adapter, stack)
        peft_config = adapter_config(adapter) if WEIGHTS in held else None
        self.model = _model(config, peft_config, held, files)
        if "SequenceClassification" in type(self.model).__name__:
            complete_classifier(self.model.config, adapter)
        self.config, self.notes = self.model.config, list[str]()
        self._own = _shapes(self.model)
        self._same = shared_names(self.model)
        self._base = Weights(files, self.model)
        _check_floating(self._base, self.model, base)
        self._moved = Weights(held[CHANGED], self.model) if CHANGED in held else None
        self._changes = Changes({}, {}, {})
        values = self._moved_values(adapter / CHANGED)
        if peft_config is not None:
            reader = held[WEIGHTS]
            wrapped = adapt(self.model, peft_config, adapter)
            check_header(reader.header, wrapped, peft_config, adapter / WEIGHTS)
            self._changes = changes_of(wrapped, set(reader.header), reader.tensor)
            _divide_among_parts(self._changes.makers, self._base.assembled)
            values |= {name: reader.header[key] for name, key in self._changes.replaced.items()}
        self._read_adapter = held[WEIGHTS].tensor if WEIGHTS in held else None
        self._dtype = dtype
        self._known = self._output_names(set(values), self._untie())
        self._check_complete()
        self.entries = {out: self._entry(name, values) for out, name in self._known.items()}
        self.config.dtype = dtype or self._usual_dtype()
        self._note_left_out()

    def make(self, name: str) -> Tensor:
        """The tensor with that name in the files to write."""
        entry, known = self.entries[name], self._known[name]
        maker = self._changes.makers.get(known)
        with torch.no_grad():
            if maker is None:
                new = self._old(known).to(entry.dtype)
            else:
                new = maker().apply(lambda: self._old(known), entry.dtype)
        if new.is_floating_point() and not torch.isfinite(new).all():
            raise ValueError(f"{name} must be finite in {entry.dtype}, got NaN or infinity")
        return new.contiguous()

    def _old(self, name: str) -> Tensor:
        """The tensor of the adapted model before the merge: tied places share one."""
        group = self._same.get(name, (name,))
        tensor = self._stored(name, group)
        # A file must not hold one storage twice, as formerly tied places would.
        return tensor.clone() if len(group) > 1 else tensor

    def _stored(self, name: str, group: tuple[str, ...]) -> Tensor:
        for other in (name, *group):
            if self._moved is not None and other in self._moved.header:
                return self._moved.tensor(other)
            if self._read_adapter is not None and other in self._changes.stored:
                return self._read_adapter(self._changes.stored[other])
        return self._base.tensor(self._in_base(name))

    def _in_base(self, name: str) -> str:
        """The name under which the base holds a tensor: tied ones are stored once."""
        same = self._same.get(name, (name,))
        return next((other for other in (name, *same) if other in self._base.header), name)

    def _entry(self, name: str, values: dict[str, Entry]) -> Entry:
        before = self._base.header.get(self._in_base(name))
        shape, dtype = before or Entry(values[name].shape, self._usual_dtype())
        if not dtype.is_floating_point:
            return Entry(shape, dtype)
        return Entry(shape, self._dtype or dtype)

    def _usual_dtype(self) -> torch.dtype:
        """The dtype of new tensors, such as a classification head: that of the largest tensor."""
        largest = max(
            self._base.header.values(), key=lambda e: (e.dtype.is_floating_point, e.shape)
        )
        return largest.dtype

    def _untie(self) -> set[str]:
        """Record in the config which places are no longer tied; returns their names."""
        names = parted(self._same, self._changes.makers)
        if not names:
            return names
        found = untied(self.model, names, skeleton)
        if found is None:
            self.notes.append(
                f"{some(sorted(names))} have values of their own now, for which the config of "
                f"{self.config.model_type} has no option: transformers reads them correctly, "
                "another program may use one value for all"
            )
            return names
        self.config, alone = found
        self.notes.append(f"no longer tied, since their values differ now: {some(sorted(names))}")
        return {name for name in alone if len(self._same.get(name, ())) > 1}

    def _output_names(self, values: set[str], alone: set[str]) -> dict[str, str]:
        """{name in the files to write: name in the model}; names that only the base's files use
        stay as they are, except for the prefix that a model with a head puts before the rest."""
        kept = [n for n in self._base.header if n in self._own or n in self._base.assembled]
        prefix = getattr(self.model, "base_model_prefix", "")
        found = {}
        for name in kept:
            stored = self._base.stored[name]
            plain = stored in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
            found[name if plain else stored] = name
        new = {name for name in values if self._in_base(name) not in kept} | alone
        return found | {name: name for name in sorted(new - set(kept))}

    def _note_left_out(self) -> None:
        absent = sorted(self._base.header.keys() - set(self._known.values()))
        if absent:
            self.notes.append(f"left out, since the model has no such tensors: {some(absent)}")

    def _moved_values(self, path: Path) -> dict[str, Entry]:
        """Tensors of the base in the adapter's folder, checked against the model."""
        if self._moved is None:
            return {}
        for name, entry in self._moved.header.items():
            if name not in self._own:
                raise ValueError(f"{path} must hold tensors of this model, got {name}")
            if self._own[name] != entry.shape:
                wanted = self._own[name]
                raise ValueError(f"{path}: {name} must have shape {wanted}, got {entry.shape}")
        return dict(self._moved.header)

    def _check_complete(self) -> None:
        there = set(self._known.values())
        for name in self._changes.makers:
            if name not in there and self._in_base(name) not in there:
                raise ValueError(
                    f"the base must hold {name}, which the adapter changes, as one tensor; got none"
                )
        for name, shape in self._own.items():
            in_base = self._base.header.get(self._in_base(name))
            # What transformers assembles from several tensors, it checks when it loads them.
            if in_base is None and name not in there and not self._base.assembled:
                raise ValueError(f"the base or the adapter must hold {name}, got neither")
            if in_base is not None and in_base.shape != shape:
                raise ValueError(f"the base: {name} must have shape {shape}, got {in_base.shape}")


def _divide_among_parts(makers: dict[str, Callable[[], Change]], parts: dict[str, Part]) -> None:
    """Replace changes of weights that transformers assembles by those of the stored parts.

    Raises NotImplementedError for a weight that is put together in another way than one expert
    after the other.
    """
    changed = {part.of for part in parts.values()} & makers.keys()
    whole = {name: functools.lru_cache(maxsize=1)(makers.pop(name)) for name in changed}
    for key, part in parts.items():
        if part.of in whole:
            if part.expert is None:
                raise NotImplementedError(
                    f"{part.of}: merge with PEFT's merge_and_unload: {key} of the base is stored "
                    "in another way than one expert after the other"
                )
            makers[key] = functools.partial(_part_of, whole[part.of], part)


def _part_of(whole: Callable[[], Change], part: Part) -> Change:
    assert part.expert is not None
    return whole().of_expert(part.expert, part.piece, part.pieces)


def _told(merging: _Merging, progress: Progress) -> Callable[[str], Tensor]:
    sizes = {name: math.prod(e.shape) * e.dtype.itemsize for name, e in merging.entries.items()}
    total, done = sum(sizes.values()), 0

    def make(name: str) -> Tensor:
        nonlocal done
        tensor = merging.make(name)
        done += sizes[name]
        progress(done, total)
        return tensor

    return make


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return None if name is None else DTYPES[name]


def _shard_bytes(size: str | int) -> int:
    if isinstance(size, str):
        from ..files.sizes import parse_memory

        return parse_memory(size, "max_shard_size", such_as="5GB")
    if size <= 0:
        raise ValueError(f"max_shard_size must be a size such as 5GB, got {size!r}")
    return size


def _unquantised(config: Any, base: Path) -> None:
    """Remove the quantisation from the config; refuses one that cannot be decoded."""
    quantised: Any = getattr(config, "quantization_config", None)
    if quantised is None:
        return
    options = quantised if isinstance(quantised, dict) else quantised.to_dict()
    if options.get("quant_method") != "bitsandbytes" or not options.get("load_in_4bit"):
        kind = options.get("quant_method", "an unknown kind")
        raise ValueError(
            f"{base} must be dense or in bitsandbytes' 4 bits, got {kind}: merge into the 16-bit "
            "model that it was made from"
        )
    del config.quantization_config


def _check_floating(weights: Weights, model: nn.Module, base: Path) -> None:
    """Check that every parameter is stored in a floating-point type."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        entry = weights.header.get(name)
        if entry is None or not parameter.is_floating_point():
            continue
        if entry.dtype not in FLOATING:
            dtype = str(entry.dtype).removeprefix("torch.")
            raise ValueError(
                f"{base} must be 16-bit, float32, float64 or 4-bit, got {name} in {dtype}: merge "
                "into the 16-bit model that it was made from"
            )


def _adapter_files(adapter: Path, stack: ExitStack) -> dict[str, TensorFiles]:
    if (adapter / CONFIG).is_file() and not (adapter / WEIGHTS).is_file():
        adapter_config(adapter)  # raises with the reason
    names = [name for name in (WEIGHTS, CHANGED) if (adapter / name).is_file()]
    if not names:
        raise ValueError(f"{adapter} must hold {CONFIG} with {WEIGHTS}, or {CHANGED}; got neither")
    return {name: stack.enter_context(TensorFiles(adapter, [name])) for name in names}


def _model(config: Any, peft_config: Any, held: dict[str, TensorFiles], files: TensorFiles) -> Any:
    """The skeleton of the adapted model: with a head if the adapter has one."""
    shapes = {
        key: entry.shape for tensors in held.values() for key, entry in tensors.header.items()
    }
    heads = [key for key in shapes if key.endswith(HEADS) and "lora_" not in key]
    task = TASKS.get(str(getattr(peft_config, "task_type", None)))
    if task is None and heads and not any(key.endswith(HEADS) for key in files.header):
        task = "classification"
    if task is not None and heads:
        config.num_labels = shapes[heads[0]][0]
    try:
        model = skeleton(config, task)
    except ValueError:
        if task is not None:
            raise
        model = skeleton(config, "causal-lm")
    model.config.architectures = [type(model).__name__]
    return model


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
