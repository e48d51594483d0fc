"""Planned bytes of mixtures beside measured ones: dense and 4-bit experts, active rows alone."""

from __future__ import annotations

from typing import Any

import pytest
from expert_models import FUSES
from planned_steps import BATCHES, SHAPE, VOCABULARY, close, compare_a_step, real_model, step
from torch import Tensor
from transformers import GptOssConfig, Qwen3MoeConfig

from lora_fast.experts.quantisation import expert_modules
from lora_fast.experts.storage import packed_experts, packed_parameters
from lora_fast.planning import Settings, plan

pytestmark = pytest.mark.skipif(not FUSES, reason="needs PEFT 0.19.1 and transformers' flags")
MIXTURE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "use_cache": False,
}
MIXTURES: dict[str, Any] = {
    "qwen3-moe": Qwen3MoeConfig(**MIXTURE, moe_intermediate_size=32, num_experts=8),
    "gpt-oss": GptOssConfig(
        **MIXTURE,
        intermediate_size=64,
        num_local_experts=8,
        pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


# gpt-oss's own gate saves for a backward of its own within that of a recomputed block.
@pytest.mark.parametrize(
    ("name", "checkpointing"), [("qwen3-moe", False), ("qwen3-moe", True), ("gpt-oss", False)]
)
def test_active_experts_are_planned(name: str, checkpointing: bool) -> None:
    """No more rows than the router chooses, of as few experts as there are."""
    settings = Settings(
        dtype="float32", experts=True, gradient_checkpointing=checkpointing, r=4, **SHAPE
    )
    compare_a_step(MIXTURES[name], settings)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_in_four_bits_are_planned(name: str) -> None:
    settings = Settings(dtype="float32", experts=True, r=4, **{**SHAPE, "quantize": "nf4"})
    planned = plan(MIXTURES[name], advise=False, **vars(settings))
    model = real_model(MIXTURES[name], settings)
    loaded = plan(model, dtype="float32", **BATCHES)
    held = [packed_experts(m, n) for _, m in expert_modules(model) for n in packed_parameters(m)]
    measured = sum(state_tensors(*found) for found in held if found)
    kind = "weights of experts, nf4"
    assert loaded.parts[kind] == measured
    # As above: the table of the scales' codes is one for all as they are quantised.
    assert planned.parts[kind] == measured - 4 * 1024
    assert loaded.parts["activations"] == planned.parts["activations"]
    saved, _ = step(model, settings)
    close(loaded.parts["activations"], saved.peak, "activations")
    _, first = next(expert_modules(model))
    largest: Any = first.gate_up_proj
    assert loaded.parts["workspace"] >= 4 * largest.numel()  # decoded at once on a GPU
    assert "in nf4, 2 of 8 compute a token, and LoRA trains" in loaded.notes[0]
    assert loaded.parameters == planned.parameters


def state_tensors(packed: Tensor, state: Any) -> int:
    return packed.nbytes + sum(
        t.nbytes
        for t in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    )
