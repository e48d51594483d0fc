"""What a plan counts of gated MLPs; test_memory.py measures whole models."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

import lora_fast
from lora_fast.planning import activations, plan

LAYERS, TOKENS, WIDTH = 2, 2 * 24, 144
LLAMA = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=WIDTH,
)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_fused_mlp_keeps_neither_the_activation_nor_h(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted() -> int:
        found = plan(
            LLAMA, advise=False, method="lora", dropout=dropout, dtype="bfloat16", quantize="none",
            task="causal-lm", batch_size=2, max_length=24,
        )  # fmt: skip
        return found.parts["activations"]

    fused, apart = counted(), lambda model: lora_fast.accelerate(model, fuse_mlp=False)
    monkeypatch.setattr(activations, "accelerate", apart)
    assert counted() - fused == LAYERS * TOKENS * 2 * WIDTH * 2
