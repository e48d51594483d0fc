"""Stand-ins for the models of the hub that PEFT's tests of experts load: the same classes, tiny and
random, in a folder that is laid out as the hub's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

_SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LAYERS = ["sliding_attention", "full_attention"]


def _configs() -> dict[str, Any]:
    llama4 = Llama4TextConfig(**_SIZES, intermediate_size_mlp=32, interleave_moe_layer_step=1)
    sizes = {key: value for key, value in _SIZES.items() if "expert" not in key}
    return {
        "hf-internal-testing/tiny-random-LlamaForCausalLM": LlamaConfig(**sizes),
        "trl-internal-testing/tiny-GptOssForCausalLM": GptOssConfig(**_SIZES, layer_types=_LAYERS),
        "trl-internal-testing/tiny-Llama4ForCausalLM": llama4,
        "trl-internal-testing/tiny-Qwen3MoeForCausalLM": Qwen3MoeConfig(
            **_SIZES, num_experts=4, moe_intermediate_size=32
        ),
        "hf-internal-testing/Mixtral-tiny": MixtralConfig(**_SIZES),
    }


def save_models(home: Path) -> None:
    """Save the models where transformers looks for them with HF_HOME at `home`."""
    for name, config in _configs().items():
        root = home / "hub" / f"models--{name.replace('/', '--')}"
        revision = "0" * 40
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(revision)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(root / "snapshots" / revision)
