"""The examples of a run, from files or the built-in task: split, ordered and padded."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler

from ..errors import TrainingError
from ..files.model_source import BUILTIN
from . import builtin_task
from .config import TrainConfig
from .encoding import IGNORED, Example
from .rows import Row, causal_row, classification_row, read_jsonl

HELD_OUT = 0.1
GROUPS_PER_MEGABATCH = 50


@dataclass(frozen=True)
class Rows:
    """Raw examples of a run. ``labels`` are the class names in the order of their ids; ``notes``
    what the user should know about them."""

    train: list[Row]
    held_out: list[Row]
    labels: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_rows(config: TrainConfig) -> Rows:
    """The run's examples, training and held-out ones.

    Raises TrainingError: a file is missing, unreadable or too small, or a line is malformed.
    """
    if config.data == BUILTIN:
        return _builtin_rows(config.seed)
    read = classification_row if config.task == "classification" else causal_row
    train, notes = read_jsonl(Path(config.data), read), list[str]()
    if config.eval_data is not None:
        held_out = read_jsonl(Path(config.eval_data), read, "--eval-data")
    else:
        count = len(train)
        train, held_out = split_rows(train, config.seed, config.data)
        if len(held_out) > 2 * _wanted(count):
            notes.append(
                f"{len(held_out):,} of {count:,} examples are held out: those with the same "
                f"{_key_name(held_out[0])} stay on one side"
            )
    unused = sorted({name for row in [*train, *held_out] for name in row.unused})
    if unused:
        notes.append(f"fields that are not used: {', '.join(unused)}")
    if config.task != "classification":
        return Rows(train, held_out, notes=notes)
    return _with_label_ids(train, held_out, config, notes)


def split_rows(rows: list[Row], seed: int, source: str) -> tuple[list[Row], list[Row]]:
    """Hold out a tenth, at least one. Rows with the same text stay on the same side.

    Raises TrainingError: all rows of ``source`` have the same text, or there is only one row.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row.get("text", row.get("messages"))), []).append(row)
    if len(rows) < 2:
        raise TrainingError(
            f"{source}: too few examples to hold one out, got {len(rows)}: add some, or give "
            "held-out ones with --eval-data"
        )
    if len(groups) < 2:
        raise TrainingError(
            f"{source}: all {len(rows):,} examples have the same {_key_name(rows[0])}, and those "
            "stay on one side when a tenth is held out: give held-out ones with --eval-data"
        )
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    train: list[Row] = []
    held_out: list[Row] = []
    for key in order:
        side = held_out if len(held_out) < _wanted(len(rows)) else train
        side.extend(groups[key])
    return (train, held_out) if train else _moved_back(groups[order[-1]], held_out)


def _moved_back(group: list[Row], held_out: list[Row]) -> tuple[list[Row], list[Row]]:
    """If there are few large groups, move the last one to the training side."""
    return group, held_out[: -len(group)]


def _wanted(count: int) -> int:
    return max(1, round(count * HELD_OUT))


def _key_name(row: Row) -> str:
    return "'text'" if "text" in row else "'messages'"


class Collator:
    """Pads a list of examples to the longest; the labels of padding are ignored by the loss."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        inputs = [{k: v for k, v in e.items() if k != "labels"} for e in examples]
        batch = dict(self.tokenizer.pad(inputs, padding=True, return_tensors="pt"))
        labels = [e["labels"] for e in examples]
        if isinstance(labels[0], int):
            batch["labels"] = torch.tensor(labels)
            return batch
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        real = batch["attention_mask"].bool()
        batch["labels"][real] = torch.tensor([label for row in labels for label in row])
        return batch


class LengthGroupedOrder(Sampler[int]):
    """A shuffled order whose batches hold examples of similar length, a function of (seed, epoch).

    ``batch_size`` is that of an optimizer step, all its accumulated batches together.
    Nothing is drawn from torch's global generator, so a resumed run sees the same order as an
    uninterrupted one, and stock PEFT the same order as lora_fast.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}:{self.epoch}")
        indices = list(range(len(self.lengths)))
        rng.shuffle(indices)
        span = self.batch_size * GROUPS_PER_MEGABATCH
        batches = []
        for start in range(0, len(indices), span):
            grouped = sorted(indices[start : start + span], key=lambda i: -self.lengths[i])
            batches += [
                grouped[i : i + self.batch_size] for i in range(0, len(grouped), self.batch_size)
            ]
        ragged = batches.pop() if len(batches[-1]) < self.batch_size else []
        rng.shuffle(batches)
        for batch in [*batches, ragged]:
            yield from batch


def _builtin_rows(seed: int) -> Rows:
    try:
        sides = builtin_task.build_pairs(seed)
    except FileNotFoundError as error:
        raise TrainingError(
            f"the built-in data need the standard library's sources: {error}"
        ) from error
    train, held_out = (
        [Row(text=p.signature, text_pair=p.description, label=p.label) for p in side]
        for side in sides
    )
    return Rows(train, held_out, ["other function", "same function"])


def _with_label_ids(
    train: list[Row], held_out: list[Row], config: TrainConfig, notes: list[str]
) -> Rows:
    kinds = {type(row["label"]) for row in train}
    if len(kinds) > 1:
        raise TrainingError(f"{config.data}: 'label' must be all strings or all integers, got both")
    values = sorted({row["label"] for row in train})
    if len(values) < 2:
        raise TrainingError(f"{config.data}: must have two labels or more, got {values}")
    ids = {value: i for i, value in enumerate(values)}
    unknown = sorted({str(r["label"]) for r in held_out if r["label"] not in ids})
    if unknown:
        raise TrainingError(f"held-out labels {unknown} must occur in the training examples")
    for row in [*train, *held_out]:
        row["label"] = ids[row["label"]]
    return Rows(train, held_out, [str(value) for value in values], notes)
