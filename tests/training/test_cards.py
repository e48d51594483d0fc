"""The code on the card of a run loads what was trained and predicts, as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import (
    metrics_of,
    run,
    save_bert,
    save_llama,
    sentiment_rows,
    write_jsonl,
)
from transformers import AutoTokenizer

from lora_fast.export import merge_checkpoint
from lora_fast.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("libraries_as_before")

PLAIN_CHAT = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ! ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cards")
    save_bert(folder / "bert")
    save_llama(folder / "llama")  # whose tokenizer has no padding token
    save_llama(folder / "plain", chat_template=PLAIN_CHAT)
    rows = [{**row, "label": ["bad", "good"][row["label"]]} for row in sentiment_rows()]
    write_jsonl(folder / "named.jsonl", rows)
    write_jsonl(folder / "pairs.jsonl", [{**row, "text_pair": "the sea"} for row in rows])
    write_jsonl(folder / "texts.jsonl", [{"text": row["text"]} for row in rows])
    write_jsonl(
        folder / "chats.jsonl",
        [
            {"messages": [{"role": "user", "content": row["text"]},
                          {"role": "assistant", "content": row["label"]}]}
            for row in rows
        ],
    )  # fmt: skip
    return folder


CASES: dict[str, dict[str, Any]] = {
    "classifier": {"model": "bert", "data": "named"},
    "pairs": {"model": "bert", "data": "pairs", "quantize": "none"},
    "decoder": {"model": "llama", "data": "named"},
    "decoder-prompt": {"model": "llama", "data": "named", "method": "prompt"},
    "decoder-pairs": {"model": "llama", "data": "pairs", "quantize": "none", "method": "dora"},
    "bitfit": {"model": "bert", "data": "named", "method": "bitfit", "quantize": "none"},
    "probe": {"model": "llama", "data": "named", "method": "probe", "quantize": "none"},
    "texts": {"model": "llama", "data": "texts", "task": "causal-lm"},
    "chats": {"model": "llama", "data": "chats", "task": "causal-lm", "quantize": "none"},
    "plain-chats": {"model": "plain", "data": "chats", "task": "causal-lm", "quantize": "none"},
    "delta": {"model": "plain", "data": "chats", "task": "causal-lm", "method": "delta-lora"},
}


@pytest.mark.parametrize("case", CASES)
def test_it_loads_and_predicts(
    case: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    options = dict(CASES[case])
    options["data"] = f"{options['data']}.jsonl"
    run(TrainConfig(**options, steps=1), tmp_path / "out")
    monkeypatch.chdir(tmp_path)  # another folder than the one it began in
    card = (tmp_path / "out" / "README.md").read_text()
    scope: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], scope)  # type: ignore[index]
    if options.get("task") == "causal-lm":
        assert isinstance(scope["predicted"], str)
    else:
        assert len(scope["predicted"]) == 2 and set(scope["predicted"]) <= {"bad", "good"}
        assert scope["model"].config.id2label == {0: "bad", 1: "good"}


def test_a_merged_classifier_takes_batches_and_knows_its_classes(
    inputs: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    config = TrainConfig(
        model=str(inputs / "llama"), data=str(inputs / "named.jsonl"), steps=1, quantize="none"
    )
    run(config, tmp_path / "out")
    merge_checkpoint(str(inputs / "llama"), tmp_path / "out", tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    assert model.config.id2label == {0: "bad", 1: "good"}
    batch = tokenizer(["the sky", "the sea is good"], padding=True, return_tensors="pt")
    assert model(**batch).logits.shape == (2, 2)
    assert metrics_of(tmp_path / "out")["labels"] == ["bad", "good"]
