"""Examples: what a jsonl file may hold, how it is split, encoded, ordered and padded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import save_bert, save_llama, sentiment_rows, write_jsonl
from transformers import AutoTokenizer

from lora_fast.training import builtin_task
from lora_fast.training.builtin_task import Pair
from lora_fast.training.config import TrainConfig
from lora_fast.training.data import (
    IGNORED,
    Collator,
    LengthGroupedOrder,
    encode,
    load_rows,
    split_rows,
)
from lora_fast.training.errors import TrainingError


@pytest.fixture(scope="module")
def bert_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def llama_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(save_llama(tmp_path_factory.mktemp("llama")))
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def classification(path: Path, **options: Any) -> TrainConfig:
    return TrainConfig(model="m", data=str(path), **options)


def causal(path: Path) -> TrainConfig:
    return TrainConfig(model="m", data=str(path), task="causal-lm", max_length=8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", r"not JSON \(.* at column 2\)"),
        ("[1]", "must be a JSON object, got list"),
        ('{"label": 1}', r"has no 'text', got \['label'\]"),
        ('{"text": "", "label": 1}', "'text' must be a non-empty string, got ''"),
        ('{"text": 3, "label": 1}', "'text' must be a non-empty string, got 3"),
        ('{"text": "a"}', "'label' must be a string or an integer, got None"),
        ('{"text": "a", "label": 0.5}', "'label' must be a string or an integer, got 0.5"),
        ('{"text": "a", "text_pair": 1, "label": 1}', "'text_pair' must be a non-empty string"),
    ],
)
def test_a_malformed_line_is_named_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "label": 0}\n\n' + line + "\n")
    with pytest.raises(TrainingError, match=rf"data\.jsonl, line 3: {message}"):
        load_rows(classification(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', r"has no 'text', got \['prompt'\]"),
        ('{"messages": []}', "'messages' must be a non-empty list"),
        ('{"messages": [{"role": "user"}]}', "a message must have 'role' and 'content'"),
        ('{"messages": ["hello"]}', "a message must have 'role' and 'content', got 'hello'"),
    ],
)
def test_a_malformed_conversation_is_named_with_its_number(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(TrainingError, match=rf"data\.jsonl, line 1: {message}"):
        load_rows(causal(path))


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
        (tmp_path, "Is a directory"),
        (one_label, r"must have two labels or more, got \[1\]"),
        (single, "too few examples, got 1"),
    ]:
        with pytest.raises(TrainingError, match=f"^{path}: {message}"):
            load_rows(classification(path))
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
    train, held_out = split_rows(rows, seed=0)
    assert 20 <= len(held_out) <= 24
    assert not {r["text"] for r in train} & {r["text"] for r in held_out}
    assert sorted(r["label"] for r in [*train, *held_out]) == list(range(200))
    assert split_rows(rows, seed=0) == (train, held_out)
    assert split_rows(rows, seed=1) != (train, held_out)


def test_pairs_are_cut_and_typed(bert_tokenizer: Any) -> None:
    rows = [{"text": "the sky " * 9, "text_pair": "is blue", "label": 1}]
    (found,) = encode(rows, bert_tokenizer, TrainConfig(max_length=9))
    assert len(found["input_ids"]) == 9
    assert found["token_type_ids"] == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert found["labels"] == 1


def test_texts_end_where_the_model_should_stop(llama_tokenizer: Any) -> None:
    rows = [{"text": "the sky"}, {"text": "the sky is blue " * 4}]
    short, long = encode(rows, llama_tokenizer, causal(Path("d")))
    assert short["input_ids"][-1] == llama_tokenizer.eos_token_id
    assert short["labels"] == short["input_ids"]
    assert len(long["input_ids"]) == 8
    assert llama_tokenizer.eos_token_id not in long["input_ids"]


def test_conversations_learn_what_the_template_marks(llama_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "sky"}, {"role": "assistant", "content": "blue"}]
    (found,) = encode([{"messages": messages}], llama_tokenizer, causal(Path("d")))
    assert llama_tokenizer.decode(found["input_ids"]) == "user : sky ? assistant : blue !"
    learned = [i for i in found["labels"] if i != IGNORED]
    assert llama_tokenizer.decode(learned) == "blue !"


def test_conversations_without_marks_are_learned_whole(llama_tokenizer: Any) -> None:
    template = llama_tokenizer.chat_template
    try:
        llama_tokenizer.chat_template = (
            "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
        )
        messages = [{"role": "user", "content": "sky blue"}]
        (found,) = encode([{"messages": messages}], llama_tokenizer, causal(Path("d")))
        assert found["labels"] == found["input_ids"]
        llama_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(TrainingError, match=r"chat template refused .*roles must alternate"):
            encode([{"messages": messages}], llama_tokenizer, causal(Path("d")))
        llama_tokenizer.chat_template = None
        with pytest.raises(TrainingError, match="has no chat template"):
            encode([{"messages": messages}], llama_tokenizer, causal(Path("d")))
    finally:
        llama_tokenizer.chat_template = template


def test_conversations_with_nothing_left_to_learn_are_dropped(llama_tokenizer: Any) -> None:
    answer = {"role": "assistant", "content": "blue"}
    long = [{"role": "user", "content": "sky " * 20}, answer]
    rows = [{"messages": long}, {"messages": [answer]}]
    assert len(encode(rows, llama_tokenizer, causal(Path("d")))) == 1
    with pytest.raises(TrainingError, match="no example has a token to learn"):
        encode(rows[:1], llama_tokenizer, causal(Path("d")))


def test_padding_is_neither_seen_nor_learned(llama_tokenizer: Any) -> None:
    rows = [{"text": "the"}, {"text": "the sky is blue"}]
    examples = encode(rows, llama_tokenizer, causal(Path("d")))
    batch = Collator(llama_tokenizer)(examples)
    lengths = [len(example["input_ids"]) for example in examples]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    expected = torch.where(batch["attention_mask"].bool(), batch["input_ids"], IGNORED)
    assert torch.equal(batch["labels"], expected)


def test_the_padding_side_does_not_move_labels(llama_tokenizer: Any) -> None:
    examples = encode([{"text": "a"}, {"text": "the sky is"}], llama_tokenizer, causal(Path("d")))
    llama_tokenizer.padding_side = "left"
    try:
        batch = Collator(llama_tokenizer)(examples)
    finally:
        llama_tokenizer.padding_side = "right"
    assert batch["labels"][0].tolist()[-2:] == examples[0]["labels"]
    assert batch["labels"][0].tolist()[:-2] == [IGNORED] * 2


def test_class_labels_are_one_per_example(bert_tokenizer: Any) -> None:
    examples = encode(sentiment_rows(4), bert_tokenizer, TrainConfig(max_length=32))
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
