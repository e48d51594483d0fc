"""Tiny models, their tokenizers, and one run that several files look at.

Rows of the matrix without the command line collect this file, too: what needs it is imported late.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest


@pytest.fixture(scope="session")
def bert_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tiny_runs import save_bert
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="session")
def llama_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tiny_runs import save_llama
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_llama(tmp_path_factory.mktemp("llama")))
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="session")
def bert_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tiny_runs import save_bert, sentiment_rows, write_jsonl

    from lora_fast.training.config import TrainConfig

    folder = tmp_path_factory.mktemp("bert")
    return TrainConfig(
        model=str(save_bert(folder / "model")),
        data=str(write_jsonl(folder / "data.jsonl", sentiment_rows())),
        steps=8,
        batch_size=8,
        r=4,
        lr=3e-3,
    )


@pytest.fixture(scope="session")
def compared_on(bert_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """One run on each kind of CPU."""
    from tiny_runs import run

    @functools.cache
    def compare(kind: str) -> Any:
        config, out = replace(bert_config, compare=True), tmp_path_factory.mktemp(kind) / "out"
        return run(config, out, paints=True)

    return compare


@pytest.fixture
def compared(cpu_kind: str, compared_on: Callable[[str], Any]) -> Any:
    return compared_on(cpu_kind)
