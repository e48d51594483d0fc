"""Scores on held-out examples, and the baselines to beat."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from .data import Collator
from .encoding import IGNORED, Example

EVAL_BATCH = 64
PROBE_EXAMPLES = 1_000

Scores = dict[str, float]


def evaluate_classification(
    model: nn.Module, examples: list[Example], collator: Collator, dtype: torch.dtype
) -> Scores:
    """Loss, accuracy, F1 and ROC AUC of a sequence classifier."""
    logits = predict_logits(model, examples, collator, dtype)
    labels = np.array([example["labels"] for example in examples])
    log_probabilities = torch.from_numpy(logits).log_softmax(-1)
    loss = nn.functional.nll_loss(log_probabilities, torch.from_numpy(labels)).item()
    return {"loss": loss, **classification_scores(labels, log_probabilities.exp().numpy())}


def classification_scores(labels: np.ndarray, probabilities: np.ndarray) -> Scores:
    """Accuracy, F1 and ROC AUC of ``probabilities`` [examples, classes].

    With two classes, F1 and ROC AUC are those of class 1; with more, F1 is the mean over classes
    and ROC AUC the mean of each class against the rest, over the classes that occur.
    """
    from sklearn.metrics import f1_score

    predicted = probabilities.argmax(-1)
    binary = probabilities.shape[1] == 2
    f1 = f1_score(labels, predicted, average="binary" if binary else "macro", zero_division=0.0)
    return {
        "accuracy": float((predicted == labels).mean()),
        "f1": float(f1),
        "roc_auc": _roc_auc(labels, probabilities),
    }


def evaluate_causal_lm(
    model: nn.Module, examples: list[Example], collator: Collator, dtype: torch.dtype
) -> Scores:
    """The mean negative log-likelihood per trained token in nats, and its exponential."""
    total, tokens = 0.0, 0
    for _, batch in _batches(model, examples, collator, EVAL_BATCH // 8):
        with torch.no_grad(), compute_context(batch["input_ids"].device, dtype):
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        # A prompt's virtual tokens have logits of their own, which come first.
        logits = logits[:, -batch["labels"].shape[1] : -1]
        labels = batch["labels"][:, 1:]
        total += nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        tokens += int((labels != IGNORED).sum())
    loss = total / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}


def predict_logits(
    model: nn.Module, examples: list[Example], collator: Collator, dtype: torch.dtype
) -> np.ndarray:
    """The logits of every example, float32 [examples, classes], in the given order."""
    found: list[tuple[int, np.ndarray]] = []
    for indices, batch in _batches(model, examples, collator, EVAL_BATCH):
        with torch.no_grad(), compute_context(batch["input_ids"].device, dtype):
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        found.extend(zip(indices, logits.float().cpu().numpy(), strict=True))
    return np.stack([row for _, row in sorted(found, key=lambda pair: pair[0])])


def majority_baseline(train: list[Example], held_out: list[Example], classes: int) -> Scores:
    """The scores of always answering with the most frequent training label."""
    counts = Counter(example["labels"] for example in train)
    probabilities = np.zeros((len(held_out), classes))
    probabilities[:, counts.most_common(1)[0][0]] = 1.0
    return classification_scores(np.array([e["labels"] for e in held_out]), probabilities)


def linear_probe(
    base: Any,
    train: list[Example],
    held_out: list[Example],
    collator: Collator,
    dtype: torch.dtype,
) -> Scores:
    """The scores of logistic regression on the frozen model's mean token states.

    The features are those of the inputs that the adapter trains on, of at most ``PROBE_EXAMPLES``.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train = train[:PROBE_EXAMPLES]
    labels = np.array([example["labels"] for example in train])
    if len(set(labels.tolist())) < 2:
        return {}
    encoder = getattr(base, base.base_model_prefix)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    probe.fit(_mean_states(encoder, train, collator, dtype), labels)
    probabilities = np.zeros((len(held_out), base.config.num_labels))
    states = _mean_states(encoder, held_out, collator, dtype)
    probabilities[:, probe.classes_] = probe.predict_proba(states)
    return classification_scores(np.array([e["labels"] for e in held_out]), probabilities)


def compute_context(device: torch.device, dtype: torch.dtype) -> Any:
    """Autocast to ``dtype`` if it is a 16-bit type, else a context that does nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _mean_states(
    encoder: nn.Module, examples: list[Example], collator: Collator, dtype: torch.dtype
) -> np.ndarray:
    found: list[tuple[int, np.ndarray]] = []
    for indices, batch in _batches(encoder, examples, collator, EVAL_BATCH):
        with torch.no_grad(), compute_context(batch["input_ids"].device, dtype):
            states = encoder(**{k: v for k, v in batch.items() if k != "labels"})[0].float()
        real = batch["attention_mask"].unsqueeze(-1).float()
        means = (states * real).sum(1) / real.sum(1)
        found.extend(zip(indices, means.cpu().numpy(), strict=True))
    return np.stack([row for _, row in sorted(found, key=lambda pair: pair[0])])


def _batches(
    model: nn.Module, examples: list[Example], collator: Collator, size: int
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield (indices, batch) in eval mode, longest first: out of memory at once or never."""
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            batch = collator([examples[i] for i in indices])
            yield indices, {name: tensor.to(device) for name, tensor in batch.items()}
    finally:
        model.train(training)


def _roc_auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    classes = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    found = [
        float(roc_auc_score(labels == c, probabilities[:, c]))
        for c in classes
        if 0 < (labels == c).sum() < len(labels)
    ]
    return float(np.mean(found)) if found else math.nan
