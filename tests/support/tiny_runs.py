"""Tiny models with their tokenizers on disk, small data files, and whole runs on them."""

from __future__ import annotations

import functools
import json
import logging
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lora_fast.cli.app import main
from lora_fast.four_bit.layout import forbid_packing
from lora_fast.training import measurement, metrics, models, plots, summary
from lora_fast.training.config import TrainConfig
from lora_fast.training.data import Collator, load_rows
from lora_fast.training.encoding import encode
from lora_fast.training.events import Silent
from lora_fast.training.folder import open_run
from lora_fast.training.run import Outcome, run_training

WORDS = ["the", "a", "sky", "sea", "is", "was", "blue", "good", "bad", "very", "user", "assistant"]
WORDS += [":", "!", "?"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' ! ' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + ' ? ' }}{% endif %}{% endfor %}"
)


def save_bert(folder: Path, *, pooler: bool = True) -> Path:
    """Write a two-layer BERT with dropout and its tokenizer; without pooler weights on request."""
    torch.manual_seed(0)
    kind = BertModel if pooler else BertForMaskedLM
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=48,
        initializer_range=0.2,
    )
    kind(config).save_pretrained(folder)
    tokenizer = _word_tokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=48,
    ).save_pretrained(folder)
    return folder


def save_llama(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write a two-layer Llama with tied embeddings; its tokenizer has no padding token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=128,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=_word_tokenizer(),
        unk_token="[UNK]",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
        model_max_length=64,
    ).save_pretrained(folder)
    return folder


def sentiment_rows(count: int = 96) -> list[dict[str, Any]]:
    """Sentences of differing length whose label is whether they say good or bad."""
    rng = random.Random(0)
    rows = []
    for index in range(count):
        words = rng.choices(["the", "sky", "sea", "is", "was", "very"], k=rng.randint(2, 12))
        words.insert(rng.randrange(len(words)), "good" if index % 2 else "bad")
        rows.append({"text": " ".join(words), "label": index % 2})
    return rows


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_cli(*arguments: object) -> int:
    """Run ``lora-fast`` in this process and return its exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    raise AssertionError("main must exit")


@contextmanager
def library_logging() -> Iterator[None]:
    """Give the libraries their log levels back, which a run in between has raised."""
    names = ("transformers", "peft", "accelerate", "bitsandbytes", "torch", "huggingface_hub")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def metrics_of(out: Path) -> dict[str, Any]:
    """What a run wrote to ``metrics.json``."""
    return json.loads((out / "metrics.json").read_text())


def run(
    config: TrainConfig,
    out: Path,
    observer: Any = None,
    *,
    resume: bool = False,
    paints: bool = False,
) -> Outcome:
    """Run a training in this process, as ``lora-fast train`` does.

    A comparison times each batch once; pictures are composed, and painted for who `paints`. Both
    would take half of the time of a tiny run.
    """
    with pytest.MonkeyPatch.context() as patch:
        timed_once = functools.partial(measurement.interleaved_step_times, repeats=1)
        patch.setattr(summary, "interleaved_step_times", timed_once)
        if not paints:
            patch.setattr(plots, "_save", _unpainted)
        with open_run(out, config, resume=resume, overwrite=False) as folder:
            return run_training(folder, observer or Silent())


def _unpainted(figure: Any, path: Path, title: str) -> None:
    path.write_text(title)
    plots._pyplot().close(figure)


class AtStep(Silent):
    """Does something when a step of an arm is done."""

    def __init__(self, arm: str, step: int, action: Callable[[], None]) -> None:
        self.arm, self.when, self.action = arm, step, action
        self.current = ""

    def training(self, arm: str, first_step: int, total_steps: int) -> None:
        self.current = arm

    def step(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        if (self.current, step) == (self.arm, self.when):
            self.action()


def interrupt() -> None:
    """Press Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


def logits(config: TrainConfig, model: Any) -> np.ndarray:
    """The model's logits of the run's held-out examples.

    Not those of bitsandbytes' packed product, which rounds the weights of a stock model once more.
    """
    forbid_packing(model)
    tokenizer = models.load_tokenizer(config.model)
    rows = load_rows(config)
    examples = encode(rows.held_out, tokenizer, replace(config, max_length=48)).examples
    return metrics.predict_logits(model, examples, Collator(tokenizer), torch.float32)


def _word_tokenizer() -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def tiny_llama() -> nn.Module:
    """Stands in for the reader's ``base_model``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


LLAMA = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=144,
    architectures=["LlamaForCausalLM"],
)
