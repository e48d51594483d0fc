"""Scores against values worked out by hand, and evaluation against plain forward passes."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import save_bert, save_llama, sentiment_rows
from torch import nn

from lora_fast.methods.base_model import Base
from lora_fast.training import metrics, models
from lora_fast.training.config import TrainConfig
from lora_fast.training.data import Collator
from lora_fast.training.encoding import IGNORED, encode

FLOAT = torch.float32


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = save_bert(tmp_path_factory.mktemp("bert"))
    return models.load_base(TrainConfig(model=str(folder), quantize="none"), ["0", "1"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = save_llama(tmp_path_factory.mktemp("llama"))
    config = TrainConfig(model=str(folder), data="d", task="causal-lm", quantize="none")
    return models.load_base(config, [])


def encoded(base: Base, rows: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    config = TrainConfig(model="m", data="d", task=task, max_length=40)
    return encode(rows, base.tokenizer, config).examples


def test_binary_scores() -> None:
    labels = np.array([1, 1, 1, 0, 0])
    positive = np.array([0.9, 0.6, 0.3, 0.7, 0.2])
    found = metrics.classification_scores(labels, np.stack([1 - positive, positive], 1))
    # 2 true positives, 1 false one, 1 missed; of 6 (positive, negative) pairs 4 are in order.
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["roc_auc"] == pytest.approx(4 / 6)


def test_scores_of_three_classes_are_means_over_classes() -> None:
    labels = np.array([0, 1, 2, 2])
    found = metrics.classification_scores(labels, np.eye(3)[[0, 1, 2, 1]])
    assert found["accuracy"] == pytest.approx(3 / 4)
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert found["roc_auc"] == pytest.approx((1 + 5 / 6 + 3 / 4) / 3)


def test_one_class_has_no_roc_auc() -> None:
    found = metrics.classification_scores(np.array([1, 1]), np.array([[0.1, 0.9], [0.8, 0.2]]))
    assert math.isnan(found["roc_auc"])
    assert found["accuracy"] == 0.5


def test_majority() -> None:
    train = [{"labels": label} for label in (0, 1, 1)]
    held_out = [{"labels": label} for label in (0, 1, 1, 1)]
    found = metrics.majority_baseline(train, held_out, 2)
    assert (found["accuracy"], found["roc_auc"]) == (0.75, 0.5)


def test_logits_come_in_the_order_of_the_examples(bert: Base) -> None:
    examples = encoded(bert, sentiment_rows(70), "classification")
    collator = Collator(bert.tokenizer)
    bert.model.train()
    found = metrics.predict_logits(bert.model, examples, collator, FLOAT)
    assert bert.model.training, "the mode must be as before"
    bert.model.eval()
    for index in (0, 13, 69):
        batch = collator([examples[index]])
        batch.pop("labels")
        with torch.no_grad():
            expected = bert.model(**batch).logits[0]
        torch.testing.assert_close(torch.from_numpy(found[index]), expected)


def test_loss_of_a_classifier_is_the_model_s_own(bert: Base) -> None:
    examples = encoded(bert, sentiment_rows(20), "classification")
    collator = Collator(bert.tokenizer)
    found = metrics.evaluate_classification(bert.model, examples, collator, FLOAT)
    with torch.no_grad():
        expected = bert.model.eval()(**collator(examples)).loss.item()
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert set(found) == {"loss", "accuracy", "f1", "roc_auc"}


def test_loss_of_a_language_model_is_per_learnable_token(llama: Base) -> None:
    rows = [{"text": "the sky is blue"}, {"text": "good"}, {"text": "the sea was very bad"}]
    examples = encoded(llama, rows, "causal-lm")
    examples[0]["labels"] = [IGNORED] * 3 + examples[0]["labels"][3:]
    found = metrics.evaluate_causal_lm(llama.model, examples, Collator(llama.tokenizer), FLOAT)
    total, tokens = 0.0, 0
    for example in examples:
        with torch.no_grad():
            logits = llama.model(torch.tensor([example["input_ids"]])).logits[0].double()
        for position, label in enumerate(example["labels"][1:]):
            if label != IGNORED:
                total -= logits[position].log_softmax(-1)[label].item()
                tokens += 1
    assert found["tokens"] == tokens == 2 + 1 + 5
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)


class FirstToken(nn.Module):
    """An encoder whose states are one-hot: token ids 0 and 1 are told apart linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.eye(4))

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.embedding(input_ids),)


class Padder:
    def pad(self, inputs: list[dict[str, Any]], **_: Any) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in inputs]) for name in inputs[0]}


def probe(labels: list[int]) -> dict[str, float]:
    encoder = FirstToken()
    base = SimpleNamespace(
        base_model_prefix="encoder", encoder=encoder, config=SimpleNamespace(num_labels=2)
    )
    examples = [
        {"input_ids": [i % 2, 3], "attention_mask": [1, 1], "labels": label}
        for i, label in enumerate(labels)
    ]
    half = len(examples) // 2
    return metrics.linear_probe(base, examples[:half], examples[half:], Collator(Padder()), FLOAT)


def test_the_probe_finds_what_is_linear_and_only_that() -> None:
    assert probe([0, 1] * 60)["roc_auc"] == 1.0
    assert probe([0, 0, 1, 1] * 30)["roc_auc"] == pytest.approx(0.5)
    assert probe([0] * 60 + [1] * 60) == {}


def test_sixteen_bit_evaluation_runs_under_autocast(tmp_path: Path, bert: Base) -> None:
    examples = encoded(bert, sentiment_rows(8), "classification")
    collator = Collator(bert.tokenizer)
    full = metrics.predict_logits(bert.model, examples, collator, FLOAT)
    half = metrics.predict_logits(bert.model, examples, collator, torch.bfloat16)
    assert half.dtype == np.float32
    assert 0 < np.abs(full - half).max() < 0.05 * np.abs(full).max() + 0.05
