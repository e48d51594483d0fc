"""Adapters of embeddings, output heads and single tokens: PEFT's own beside fused layers."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import peft
import pytest
import torch
from lora_models import lora_config
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_fast
from bench.instruments.accuracy import assert_all_accurate

IN, OUT, SAMPLES, TOKENS, WORDS = 24, 16, 3, 30, 11


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(IN, OUT), nn.Linear(IN, OUT, bias=False)
        self.o_proj = nn.Linear(OUT, IN)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)
        k = self.k_proj(x)
        return self.o_proj(torch.tanh(q) * k)


class Tied(nn.Module):
    """A model of tokens whose output head has the weight of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, IN)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(IN, WORDS, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.config = {"tie_word_embeddings": True}
        self._tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


TOKEN_CONFIGS = {
    "trainable_token_indices": {"trainable_token_indices": [1, 4]},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "embed_tokens": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "ensure_weight_tying": {
        "target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True,
    },
    "tokens of a tied head": {
        "trainable_token_indices": {"embed_tokens": [1, 4]},
        "target_modules": ["q_proj", "lm_head"],
    },
    "target_parameters": {
        "target_parameters": ["layers.0.q_proj.weight"], "target_modules": ["k_proj"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TOKEN_CONFIGS)
def test_the_layers_of_a_config_that_names_other_modules(name: str) -> None:
    options = TOKEN_CONFIGS[name]
    missing = options.keys() - {field.name for field in dataclasses.fields(LoraConfig)}
    if missing:
        pytest.skip(f"PEFT {peft.__version__} has no {missing}")

    def build() -> Any:  # PEFT's tied adapters cannot be copied
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(
                Tied(), lora_config(**{"target_modules": ["q_proj", "k_proj", "o_proj"], **options})
            )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.1
        return model

    stock, wide, fused = build(), build().double(), lora_fast.accelerate(build())
    tokens = torch.randint(WORDS, (SAMPLES, TOKENS))

    def gradients(model: Any) -> dict[str, Tensor | None]:
        y = model(tokens)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return {"y": y.detach(), **trained}

    actual, expected, exact = gradients(fused), gradients(stock), gradients(wide)
    assert_all_accurate(actual, exact, expected, compute_dtype=torch.float32)
    assert lora_fast.report(fused).fused_calls > 0
