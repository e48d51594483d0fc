"""Examples: what a jsonl file may hold, how it is split, encoded, ordered and padded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import sentiment_rows, write_jsonl

from lora_fast.errors import TrainingError
from lora_fast.training import builtin_task
from lora_fast.training.builtin_task import Pair
from lora_fast.training.config import TrainConfig
from lora_fast.training.data import Collator, LengthGroupedOrder, load_rows, split_rows
from lora_fast.training.encoding import IGNORED, encode
from lora_fast.training.rows import Row


def classification(path: Path, **options: Any) -> TrainConfig:
    return TrainConfig(model="m", data=str(path), **options)


def causal(path: Path) -> TrainConfig:
    return TrainConfig(model="m", data=str(path), task="causal-lm", max_length=8)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    missing, empty, binary = (tmp_path / name for name in ("missing", "empty", "binary"))
    empty.write_text("\n\n")
    binary.write_bytes(b"\xff\xfe\x00")
    one_label = write_jsonl(tmp_path / "one", [{"text": str(i), "label": 1} for i in range(9)])
    mixed = write_jsonl(tmp_path / "mixed", [{"text": str(i), "label": i} for i in range(9)])
    mixed.write_text(mixed.read_text() + '{"text": "x", "label": "y"}\n')
    single = write_jsonl(tmp_path / "single", [{"text": "a", "label": 1}])
    for path, message in [
        (missing, "no such file"),
        (empty, "holds no examples"),
        (binary, "not UTF-8 text"),
        (one_label, r"must have two labels or more, got \[1\]"),
        (single, "too few examples to hold one out, got 1: add some, or give held-out ones with"),
    ]:
        with pytest.raises(TrainingError, match=f"^(--data )?{path}: {message}"):
            load_rows(classification(path))
    with pytest.raises(TrainingError, match=f"^--data must be a jsonl file, got .*{tmp_path}$"):
        load_rows(classification(tmp_path))
    with pytest.raises(TrainingError, match="all strings or all integers, got both"):
        load_rows(classification(mixed, eval_data=str(single)))


def test_labels_become_ids_in_sorted_order(tmp_path: Path) -> None:
    names = ["pos", "neg", "mid"] * 20
    path = write_jsonl(
        tmp_path / "d", [{"text": f"t{i}", "label": name} for i, name in enumerate(names)]
    )
    rows = load_rows(classification(path))
    assert rows.labels == ["mid", "neg", "pos"]
    for row in [*rows.train, *rows.held_out]:
        assert rows.labels[row["label"]] == names[int(row["text"][1:])]


def test_held_out_examples_from_their_own_file(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train", sentiment_rows(20))
    other = write_jsonl(tmp_path / "other", [{"text": "good", "label": 1}])
    rows = load_rows(classification(train, eval_data=str(other)))
    assert (len(rows.train), rows.held_out) == (20, [{"text": "good", "label": 1}])
    write_jsonl(tmp_path / "other", [{"text": "good", "label": 7}])
    with pytest.raises(TrainingError, match=r"held-out labels \['7'\] must occur"):
        load_rows(classification(train, eval_data=str(other)))


def test_the_split_keeps_equal_texts_together_and_loses_nothing() -> None:
    rows = [{"text": f"t{i % 40}", "label": i} for i in range(200)]
    train, held_out = split_rows(rows, 0, "data")
    assert 20 <= len(held_out) <= 24
    assert not {r["text"] for r in train} & {r["text"] for r in held_out}
    assert sorted(r["label"] for r in [*train, *held_out]) == list(range(200))
    assert split_rows(rows, 0, "data") == (train, held_out)
    assert split_rows(rows, 1, "data") != (train, held_out)


def test_equal_texts_stay_together_and_that_is_told(tmp_path: Path) -> None:
    one = [{"text": "Which?", "text_pair": f"p{i}", "label": i % 2} for i in range(300)]
    path = write_jsonl(tmp_path / "one", one)
    with pytest.raises(TrainingError, match=r"all 300 examples have the same 'text', and those s"):
        load_rows(classification(path))
    held = write_jsonl(tmp_path / "held", one[:10])
    assert len(load_rows(classification(path, eval_data=str(held))).train) == 300
    halves = [{**row, "text": "ab"[i // 150]} for i, row in enumerate(one)]
    rows = load_rows(classification(write_jsonl(tmp_path / "two", halves)))
    assert (len(rows.train), len(rows.held_out)) == (150, 150)
    assert rows.notes == [
        "150 of 300 examples are held out: those with the same 'text' stay on one side"
    ]


def test_something_is_left_to_train_on_whatever_the_sizes() -> None:
    rows = [Row(text="ab"[i > 0], label=i) for i in range(100)]
    for seed in range(4):
        train, held_out = split_rows(rows, seed, "data")
        assert sorted((len(train), len(held_out))) == [1, 99]


def test_fields_that_are_not_used_are_told(tmp_path: Path) -> None:
    rows = [{"text": str(i), "label": i % 2, "id": i, "source": "x"} for i in range(20)]
    found = load_rows(classification(write_jsonl(tmp_path / "d", rows)))
    assert found.notes == ["fields that are not used: id, source"]
    assert found.train[0].keys() == {"text", "label"}


def test_padding_is_neither_seen_nor_learned(llama_tokenizer: Any) -> None:
    rows = [{"text": "the"}, {"text": "the sky is blue"}]
    examples = encode(rows, llama_tokenizer, causal(Path("d"))).examples
    batch = Collator(llama_tokenizer)(examples)
    lengths = [len(example["input_ids"]) for example in examples]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    expected = torch.where(batch["attention_mask"].bool(), batch["input_ids"], IGNORED)
    assert torch.equal(batch["labels"], expected)


def test_the_padding_side_does_not_move_labels(llama_tokenizer: Any) -> None:
    rows = [{"text": "a"}, {"text": "the sky is"}]
    examples = encode(rows, llama_tokenizer, causal(Path("d"))).examples
    llama_tokenizer.padding_side = "left"
    try:
        batch = Collator(llama_tokenizer)(examples)
    finally:
        llama_tokenizer.padding_side = "right"
    assert batch["labels"][0].tolist()[-2:] == examples[0]["labels"]
    assert batch["labels"][0].tolist()[:-2] == [IGNORED] * 2


def test_class_labels_are_one_per_example(bert_tokenizer: Any) -> None:
    examples = encode(sentiment_rows(4), bert_tokenizer, TrainConfig(max_length=32)).examples
    assert Collator(bert_tokenizer)(examples)["labels"].tolist() == [0, 1, 0, 1]


class TestLengthGroupedOrder:
    lengths = tuple((7 * i) % 50 + 1 for i in range(515))

    def test_every_example_once_per_epoch(self) -> None:
        order = LengthGroupedOrder(list(self.lengths), 8, seed=0)
        assert len(order) == 515
        assert Counter(order) == Counter(range(515))

    def test_a_function_of_seed_and_epoch_only(self) -> None:
        order = LengthGroupedOrder(list(self.lengths), 8, seed=0)
        first = list(order)
        state = torch.get_rng_state()
        assert list(order) == first
        assert torch.equal(torch.get_rng_state(), state)
        order.set_epoch(1)
        assert list(order) != first
        order.set_epoch(0)
        assert list(order) == first
        assert list(LengthGroupedOrder(list(self.lengths), 8, seed=1)) != first

    def test_batches_waste_little_on_padding(self) -> None:
        def padding(order: list[int]) -> int:
            batches = [order[i : i + 8] for i in range(0, len(order), 8)]
            longest = [max(self.lengths[i] for i in batch) * len(batch) for batch in batches]
            return sum(longest) - sum(self.lengths)

        grouped = list(LengthGroupedOrder(list(self.lengths), 8, seed=0))
        assert padding(grouped) < padding(list(range(515))) / 5

    def test_batches_do_not_come_by_length(self) -> None:
        order = list(LengthGroupedOrder(list(self.lengths), 8, seed=0))
        longest = [max(self.lengths[i] for i in order[k : k + 8]) for k in range(0, 400, 8)]
        assert longest not in (sorted(longest), sorted(longest, reverse=True))

    def test_the_ragged_batch_is_the_last(self) -> None:
        order = LengthGroupedOrder([5, 4, 3, 2, 1], 2, seed=0)
        assert list(order)[-1] == 4


def test_builtin_rows_are_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    side = [Pair("f.py", "read: n", "Close it.", 0), Pair("f.py", "read: n", "Read it.", 1)]
    monkeypatch.setattr(builtin_task, "build_pairs", lambda seed: (side[:1], side[1:]))
    rows = load_rows(TrainConfig())
    assert rows.train == [{"text": "read: n", "text_pair": "Close it.", "label": 0}]
    assert rows.held_out == [{"text": "read: n", "text_pair": "Read it.", "label": 1}]
    assert rows.labels == ["other function", "same function"]


def test_a_python_without_sources_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_sources(seed: int) -> None:
        raise FileNotFoundError("no documented Python functions found under /lib")

    monkeypatch.setattr(builtin_task, "build_pairs", no_sources)
    with pytest.raises(TrainingError, match="built-in data need the standard library's sources"):
        load_rows(TrainConfig())
