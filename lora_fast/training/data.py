"""Examples: jsonl files and the built-in task, split, encoded, put in order and padded.

A classification line holds ``text``, optionally ``text_pair``, and ``label``; a causal-lm line
holds ``text``, or ``messages`` for the tokenizer's chat template.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler

from . import builtin_task
from .config import BUILTIN, TrainConfig
from .errors import TrainingError, first_line

HELD_OUT = 0.1
IGNORED = -100
GROUPS_PER_MEGABATCH = 50

Row = dict[str, Any]
Example = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Raw examples of a run. ``labels`` are the class names in the order of their ids."""

    train: list[Row]
    held_out: list[Row]
    labels: list[str] = field(default_factory=list)


def load_rows(config: TrainConfig) -> Rows:
    """Return the run's examples, the held-out ones apart.

    Raises:
        TrainingError: a file is missing, unreadable or too small, or a line is malformed.
    """
    if config.data == BUILTIN:
        return _builtin_rows(config.seed)
    read = _classification_row if config.task == "classification" else _causal_row
    train = read_jsonl(Path(config.data), read)
    if config.eval_data is not None:
        held_out = read_jsonl(Path(config.eval_data), read)
    else:
        train, held_out = split_rows(train, config.seed)
    if not train or not held_out:
        raise TrainingError(f"{config.data}: too few examples, got {len(train) + len(held_out)}")
    if config.task != "classification":
        return Rows(train, held_out)
    return _with_label_ids(train, held_out, config)


def read_jsonl(path: Path, read: Any) -> list[Row]:
    """Return ``read(object)`` for every non-blank line of a jsonl file.

    Raises:
        TrainingError: the file cannot be read, or a line is malformed (the message has its number).
    """
    rows = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    rows.append(read(_json_object(line)))
                except ValueError as error:
                    raise TrainingError(f"{path}, line {number}: {first_line(error)}") from error
    except FileNotFoundError:
        raise TrainingError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path}: not UTF-8 text ({first_line(error)})") from error
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}") from error
    if not rows:
        raise TrainingError(f"{path}: holds no examples")
    return rows


def split_rows(rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out a tenth, at least one. Rows with the same text stay on the same side."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row.get("text", row.get("messages"))), []).append(row)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    wanted = max(1, round(len(rows) * HELD_OUT))
    train: list[Row] = []
    held_out: list[Row] = []
    for key in order:
        (held_out if len(held_out) < wanted else train).extend(groups[key])
    return train, held_out


def encode(rows: list[Row], tokenizer: Any, config: TrainConfig) -> list[Example]:
    """Return token ids (and labels) of every row, cut to ``config.max_length`` tokens."""
    if config.task == "classification":
        return _encode_pairs(rows, tokenizer, config.max_length)
    return _encode_texts(rows, tokenizer, config.max_length)


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
    Nothing is drawn from torch's global generator: a resumed run sees the very order of an
    uninterrupted one, and stock PEFT sees the order that lora_fast sees.
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
        [{"text": p.signature, "text_pair": p.description, "label": p.label} for p in side]
        for side in sides
    )
    return Rows(train, held_out, ["other function", "same function"])


def _json_object(line: str) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, got {type(value).__name__}")
    return value


def _text(row: Row, name: str) -> str:
    if name not in row:
        raise ValueError(f"has no {name!r}, got {sorted(row)}")
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(f"{name!r} must be a non-empty string, got {row[name]!r:.60}")
    return row[name]


def _classification_row(row: Row) -> Row:
    found: Row = {"text": _text(row, "text"), "label": row.get("label")}
    if row.get("text_pair") is not None:
        found["text_pair"] = _text(row, "text_pair")
    if not isinstance(found["label"], str | int):
        raise ValueError(f"'label' must be a string or an integer, got {found['label']!r:.60}")
    return found


def _causal_row(row: Row) -> Row:
    if "messages" not in row:
        return {"text": _text(row, "text")}
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' must be a non-empty list, got {messages!r:.60}")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"a message must have 'role' and 'content', got {message!r:.60}")
    return {"messages": messages}


def _with_label_ids(train: list[Row], held_out: list[Row], config: TrainConfig) -> Rows:
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
    return Rows(train, held_out, [str(value) for value in values])


def _encode_pairs(rows: list[Row], tokenizer: Any, max_length: int | None) -> list[Example]:
    texts = [row["text"] for row in rows]
    paired = any("text_pair" in row for row in rows)
    pairs = [row.get("text_pair", "") for row in rows] if paired else None
    found = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    return [
        {**{name: values[i] for name, values in found.items()}, "labels": row["label"]}
        for i, row in enumerate(rows)
    ]


def _encode_texts(rows: list[Row], tokenizer: Any, max_length: int | None) -> list[Example]:
    limit = max_length or sys.maxsize
    found = [
        _encode_chat(row["messages"], tokenizer, limit)
        if "messages" in row
        else _encode_text(row["text"], tokenizer, limit)
        for row in rows
    ]
    learnable = [e for e in found if any(label != IGNORED for label in e["labels"][1:])]
    if not learnable:
        raise TrainingError(f"no example has a token to learn within --max-length {max_length}")
    return learnable


def _encode_text(text: str, tokenizer: Any, limit: int) -> Example:
    ids = tokenizer(text)["input_ids"]
    end = tokenizer.eos_token_id
    if end is not None and ids[-1:] != [end]:
        ids = [*ids, end]
    return _causal_example(ids, ids, limit)


def _encode_chat(messages: list[Row], tokenizer: Any, limit: int) -> Example:
    """Learn the assistant's tokens where the template marks them, else the whole conversation."""
    template = tokenizer.chat_template
    if not template:
        raise TrainingError("the tokenizer has no chat template: give 'text' instead of 'messages'")
    marked = "{% generation" in str(template) or "{%- generation" in str(template)
    try:
        found = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=marked
        )
    except Exception as error:  # the template is the model's own program: it may raise anything
        raise TrainingError(
            f"the chat template refused {messages!r:.60}: {first_line(error)}"
        ) from error
    ids = found["input_ids"]
    mask = found["assistant_masks"] if marked else [1] * len(ids)
    return _causal_example(
        ids, [i if m else IGNORED for i, m in zip(ids, mask, strict=True)], limit
    )


def _causal_example(ids: list[int], labels: list[int], limit: int) -> Example:
    ids, labels = ids[:limit], labels[:limit]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
