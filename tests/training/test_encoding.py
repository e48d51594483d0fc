"""Examples as tokens and labels, and the line that says how they were used."""

from __future__ import annotations

from typing import Any

import pytest

from lora_fast.errors import TrainingError
from lora_fast.training.config import TrainConfig
from lora_fast.training.encoding import (
    IGNORED,
    NO_ANSWER,
    count_examples,
    describe_examples,
    encode,
)
from lora_fast.training.rows import Row

ANSWER = {"role": "assistant", "content": "blue"}
CAUSAL = TrainConfig(model="m", data="d", task="causal-lm", max_length=8)


def test_pairs_are_cut_and_typed(bert_tokenizer: Any) -> None:
    rows = [
        Row(text="the sky " * 9, text_pair="is blue", label=1),
        Row(text="sky", text_pair="sea", label=0),
    ]
    encoded = encode(rows, bert_tokenizer, TrainConfig(max_length=9))
    found = encoded.examples[0]
    assert len(found["input_ids"]) == 9
    assert found["token_type_ids"] == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert found["labels"] == 1
    assert encoded.cut == 1 and not encoded.left_out


def test_texts_end_where_the_model_should_stop(llama_tokenizer: Any) -> None:
    rows = [Row(text="the sky"), Row(text="the sky is blue " * 4)]
    encoded = encode(rows, llama_tokenizer, CAUSAL)
    short, long = encoded.examples
    assert short["input_ids"][-1] == llama_tokenizer.eos_token_id
    assert short["labels"] == short["input_ids"]
    assert len(long["input_ids"]) == 8
    assert llama_tokenizer.eos_token_id not in long["input_ids"]
    assert encoded.cut == 1


def test_conversations_learn_what_the_template_marks(llama_tokenizer: Any) -> None:
    row = Row(messages=[{"role": "user", "content": "sky"}, ANSWER])
    (found,) = encode([row], llama_tokenizer, CAUSAL).examples
    assert llama_tokenizer.decode(found["input_ids"]) == "user : sky ? assistant : blue !"
    learned = [i for i in found["labels"] if i != IGNORED]
    assert llama_tokenizer.decode(learned) == "blue !"


def test_conversations_are_learned_whole_where_that_is_asked_for(llama_tokenizer: Any) -> None:
    row = Row(messages=[{"role": "user", "content": "sky"}, ANSWER])
    config = TrainConfig(model="m", data="d", task="causal-lm", max_length=8, train_on="all")
    (found,) = encode([row], llama_tokenizer, config).examples
    assert found["labels"] == found["input_ids"]


def test_what_has_nothing_to_learn_is_counted_with_the_reason(llama_tokenizer: Any) -> None:
    question = {"role": "user", "content": "sky"}
    long = Row(messages=[{"role": "user", "content": "sky " * 20}, ANSWER])
    rows = [long, long, Row(messages=[question]), Row(messages=[question, ANSWER])]
    encoded = encode(rows, llama_tokenizer, CAUSAL)
    assert len(encoded.examples) == 1
    assert encoded.left_out == {"no token to learn within 8 tokens": 2, NO_ANSWER: 1}
    with pytest.raises(TrainingError, match="no example can be learned from: no token to learn wi"):
        encode(rows[:1], llama_tokenizer, CAUSAL)


def test_the_line_says_all_that_became_of_them(llama_tokenizer: Any) -> None:
    question = {"role": "user", "content": "sky"}
    long = Row(messages=[{"role": "user", "content": "sky " * 20}, ANSWER])
    cut = Row(messages=[question, {"role": "assistant", "content": "blue " * 20}])
    side = encode([long, cut, Row(messages=[question])], llama_tokenizer, CAUSAL)
    nothing = encode([cut], llama_tokenizer, CAUSAL)
    sides = {"train": side, "validation": nothing, "held_out": nothing}
    counts = count_examples(sides, CAUSAL, chats=True, whole_model=True)
    assert describe_examples(counts) == (
        "1 examples to train, 1 to stop by, 1 held out; left out 1 with no token to learn within 8 "
        "tokens and 1 with no turn of the assistant; 3 cut to 8 tokens, all that the model takes; "
        "learns the assistant's turns"
    )
    whole = count_examples(sides, CAUSAL, chats=False, whole_model=False)
    assert describe_examples(whole).endswith("; 3 cut to 8 tokens; learns every token")
    pairs = count_examples(sides, TrainConfig(max_length=8), chats=False, whole_model=True)
    assert "learns" not in describe_examples(pairs)
