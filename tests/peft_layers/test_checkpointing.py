"""Gradients under checkpointing equal those without it, with masks replayed, in copies as well:
bitwise where stock's are, else no further apart than stock's.

Tiny random models of twenty families; the suite runs a sample, the exhaustive leg all.
"""

from __future__ import annotations

import copy
import io
import itertools
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lora_models import accelerated_copy
from peft import LoraConfig, get_peft_model
from products import products_of
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers import AutoModelForSeq2SeqLM as AutoSeq2Seq

import lora_fast
from bench.instruments.accuracy import assert_accurate, assert_same_bits

SIZES = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
GROUPED_QUERY = {"num_key_value_heads": 2, "head_dim": 8}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen3", "gemma", "gemma2", "olmo2", "granite", "cohere"),
                    (AutoModelForCausalLM, GROUPED_QUERY)),
    "qwen2": (AutoModelForCausalLM, {"num_key_value_heads": 2}),
    "phi": (AutoModelForCausalLM, {}),
    "phi3": (AutoModelForCausalLM, {"num_key_value_heads": 2}),
    "gpt_neox": (AutoModelForCausalLM, {}),
    "opt": (AutoModelForCausalLM, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    **dict.fromkeys(("bert", "roberta", "electra"), (AutoModelForMaskedLM, {})),
    "distilbert": (AutoModelForMaskedLM, DISTILBERT),
    "t5": (AutoSeq2Seq, T5),
    "mt5": (AutoSeq2Seq, {**T5, "feed_forward_proj": "gated-gelu"}),
    "bart": (AutoSeq2Seq, BART),
}  # fmt: skip
CHECKPOINTS = {"none": None, "reentrant": True, "non-reentrant": False}
# Batches by their number of rows.
BATCHES = {8: (1, 8), 200: (2, 100)}
COPIES = ("fresh", "deepcopy", "pickled")


@dataclass(frozen=True)
class Case:
    family: str
    checkpoint: str
    p: float
    rows: int
    copied: str

    def __str__(self) -> str:
        return f"{self.family}-{self.checkpoint}-p{self.p}-M{self.rows}-{self.copied}"


CASES = [
    Case(*values)
    for values in itertools.product(FAMILIES, CHECKPOINTS, (0.0, 0.1), BATCHES, COPIES)
]


def sample() -> set[Case]:
    """One case of each family under checkpointing, and some more."""
    drawn = random.Random(4)
    proper = [case for case in CASES if case.checkpoint != "none"]
    first = [drawn.choice([c for c in proper if c.family == family]) for family in FAMILIES]
    return {*first, *drawn.sample(CASES, 8)}


SAMPLE = sample()
PARAMS = [
    pytest.param(case, id=str(case), marks=[] if case in SAMPLE else [pytest.mark.exhaustive])
    for case in CASES
]


def test_the_sample_is_small_and_has_every_family() -> None:
    assert len(FAMILIES) == 20
    assert len(SAMPLE) <= 30
    assert {case.family for case in SAMPLE} == FAMILIES.keys()
    for field in ("checkpoint", "p", "rows", "copied"):
        assert {getattr(c, field) for c in SAMPLE} == {getattr(c, field) for c in CASES}


def stock_model(family: str, p: float) -> Any:
    torch.manual_seed(0)
    kind, options = FAMILIES[family]
    start = {"decoder_start_token_id": 0} if kind is AutoSeq2Seq else {}
    sizes = {k: v for k, v in SIZES.items() if kind is not AutoSeq2Seq or k in ("vocab_size",)}
    config = AutoConfig.for_model(family, **{**sizes, "pad_token_id": 0, **start, **options})
    lora = LoraConfig(r=4, lora_dropout=p, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(kind.from_config(config, attn_implementation="eager"), lora).train()


def inputs(rows: int) -> dict[str, Tensor]:
    ids = torch.randint(1, 32, BATCHES[rows], generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "labels": ids.clone()}


def step(model: Any, checkpoint: str, rows: int) -> dict[str, Tensor]:
    """The loss and every gradient of a step whose random numbers are always the same."""
    reentrant = CHECKPOINTS[checkpoint]
    if reentrant is None:
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.zero_grad()
    model.enable_input_require_grads()
    torch.manual_seed(7)
    loss = model(**inputs(rows)).loss
    loss.backward()
    model.disable_input_require_grads()  # its hook is nothing that could be pickled
    trained = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **trained}


def _relative(error: Tensor, value: Tensor) -> float:
    return (error.abs().max() / value.abs().max()).item()


def copy_of(model: Any, kind: str) -> Any:
    if kind == "pickled":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)
    return copy.deepcopy(model) if kind == "deepcopy" else model


def promised_products(fused: Any, stock: Any, rows: int) -> int:
    """Products of a forward pass if groups are as reported: each spares all shrinks but one."""
    report = lora_fast.report(fused)
    assert all(layer.fused and layer.counted for layer in report.layers)
    groups = Counter(
        (layer.name.rpartition(".")[0], frozenset({layer.name.rpartition(".")[2], *layer.siblings}))
        for layer in report.layers
    )
    spared = sum(len(names) - 1 for _, names in groups)
    return products_of(lambda: stock(**inputs(rows))) - spared


@pytest.mark.parametrize("case", PARAMS)
def test_checkpointing(case: Case) -> None:
    stock = stock_model(case.family, case.p)
    first = accelerated_copy(stock)
    expected = step(first, "none", case.rows)
    assert len(expected) > 8
    fused = copy_of(first, case.copied)
    try:
        theirs = step(stock, "none", case.rows), step(stock, case.checkpoint, case.rows)
    except RuntimeError as error:
        # transformers 4 does not make the inputs of BART's blocks require gradients.
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            step(fused, case.checkpoint, case.rows)
        return
    actual = step(fused, case.checkpoint, case.rows)
    assert actual.keys() == expected.keys() == theirs[0].keys()
    # Gradients of a tensor that is read in several places are added in another order. How far apart
    # that may be, stock shows: by its worst tensor, since of a single one it may be luck.
    apart = {n: _relative(under - theirs[0][n], theirs[0][n]) for n, under in theirs[1].items()}
    worst = max(apart.values())
    for name, value in expected.items():
        if apart[name] == 0:
            assert_same_bits(actual[name], value, name=name)
        else:
            sample = value + worst * value.abs().max()
            assert_accurate(actual[name], value.double(), sample, name=name)
    for model in (stock, fused):
        model.gradient_checkpointing_disable()
    with torch.no_grad():
        promised = promised_products(fused, stock, case.rows)
        assert products_of(lambda: fused(**inputs(case.rows))) == promised
    assert lora_fast.report(fused).fallback_calls == {}
