"""Examples as token ids and labels, with counts of those truncated or left out."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..errors import TrainingError
from .chat import Conversations
from .config import TrainConfig
from .rows import Row

IGNORED = -100
NO_ANSWER = "no turn of the assistant"

Example = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """Examples to train on or to score. ``cut`` of them were truncated; ``left_out`` counts the
    dropped ones by reason."""

    examples: list[Example]
    cut: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def encode(rows: list[Row], tokenizer: Any, config: TrainConfig) -> Encoded:
    """Token ids (and labels) of every row, truncated to ``config.max_length`` tokens.

    Raises TrainingError: no row has a token to train on, or the template rejects a conversation.
    """
    if config.task == "classification":
        return _encode_pairs(rows, tokenizer, config.max_length)
    return _encode_texts(rows, tokenizer, config)


def count_examples(
    sides: dict[str, Encoded], config: TrainConfig, *, chats: bool, whole_model: bool
) -> dict[str, Any]:
    """How the examples were used, as ``metrics.json`` records it.

    ``whole_model``: the limit on their length is the model's.
    """
    left_out: Counter[str] = Counter()
    for side in sides.values():
        left_out += side.left_out
    learned = "labels"
    if config.task == "causal-lm":
        learned = "the assistant's turns" if chats and config.train_on == "assistant" else "all"
    return {
        **{name: len(side.examples) for name, side in sides.items()},
        "left_out": dict(left_out),
        "cut": sum(side.cut for side in sides.values()),
        "max_length": config.max_length,
        "whole_model": whole_model,
        "learned": learned,
    }


def describe_examples(counts: dict[str, Any]) -> str:
    """A line with the number of examples, how many were left out and how many truncated."""
    text = f"{counts['train']:,} examples to train"
    if counts["validation"]:
        text += f", {counts['validation']:,} to stop by"
    text += f", {counts['held_out']:,} held out"
    if counts["left_out"]:
        reasons = " and ".join(f"{n:,} with {reason}" for reason, n in counts["left_out"].items())
        text += f"; left out {reasons}"
    if counts["cut"]:
        text += f"; {counts['cut']:,} cut to {counts['max_length']:,} tokens"
        text += ", all that the model takes" if counts["whole_model"] else ""
    learned = {"labels": "", "all": "; learns every token"}
    return text + learned.get(counts["learned"], f"; learns {counts['learned']}")


def _encode_pairs(rows: list[Row], tokenizer: Any, max_length: int | None) -> Encoded:
    texts = [row["text"] for row in rows]
    paired = any("text_pair" in row for row in rows)
    pairs = [row.get("text_pair", "") for row in rows] if paired else None
    lengths = [len(ids) for ids in tokenizer(texts, pairs, verbose=False)["input_ids"]]
    found = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    examples = [
        {**{name: values[i] for name, values in found.items()}, "labels": row["label"]}
        for i, row in enumerate(rows)
    ]
    cut = sum(
        length > len(example["input_ids"])
        for length, example in zip(lengths, examples, strict=True)
    )
    return Encoded(examples, cut)


def _encode_texts(rows: list[Row], tokenizer: Any, config: TrainConfig) -> Encoded:
    limit = config.max_length or sys.maxsize
    chats = any("messages" in row for row in rows)
    conversations = Conversations(tokenizer, config.train_on) if chats else None
    examples, cut, left_out = [], 0, Counter[str]()
    for row in rows:
        if conversations is not None and "messages" in row:
            ids, learned = conversations.encode(row)
        else:
            ids = _text_ids(row["text"], tokenizer)
            learned = [True] * len(ids)
        # The first token is never predicted.
        if not any(learned[1:limit]):
            short = any(learned[1:])
            left_out[f"no token to learn within {limit:,} tokens" if short else NO_ANSWER] += 1
            continue
        cut += len(ids) > limit
        examples.append(_example(ids[:limit], learned[:limit]))
    if not examples:
        reasons = " and ".join(left_out)
        raise TrainingError(
            f"no example can be learned from: {reasons}; see --max-length and --train-on"
        )
    return Encoded(examples, cut, left_out)


def _text_ids(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    end = tokenizer.eos_token_id
    return [*ids, end] if end is not None and ids[-1:] != [end] else ids


def _example(ids: list[int], learned: list[bool]) -> Example:
    labels = [i if keep else IGNORED for i, keep in zip(ids, learned, strict=True)]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
