"""Tiny random models of many families of transformers, built from their configs alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from lora_fast.features import installed

VOCABULARY = 64
# What a config calls its sizes; each family takes those of its own.
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
    "num_heads": 4, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64, "n_inner": 48,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "ffn_dim": 48,
    "word_embed_proj_dim": 32, "embedding_size": 32, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_topk": 2, "moe_num_experts": 4, "kv_lora_rank": 8,
    "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "sliding_window": 32, "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4,
    "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_dt_rank": 4,
    "conv_kernel": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "conv_L_cache": 3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8, "attention_window": 8, "lru_width": 32,
    "attention_window_size": 8, "num_codebooks": 1, "dim": 32, "hidden_dim": 48, "n_heads": 4,
    "n_layers": 2,
}  # fmt: skip
# What a family needs beside its sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 4}, "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "deepseek_v2": {"num_key_value_heads": 4}, "deepseek_v3": {"num_key_value_heads": 4},
    "jamba": {"use_mamba_kernels": False}, "mamba2": {"head_dim": 16, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 64}, "qwen3_5_text": {},
    **{name: {"decoder_start_token_id": 0} for name in ("t5", "longt5", "switch_transformers")},
    **{name: {} for name in (
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3",
        "gpt_neox", "gpt2", "opt", "bloom", "mpt", "stablelm", "starcoder2", "olmo", "olmo2",
        "olmo3", "granite", "cohere", "cohere2", "glm", "glm4", "smollm3", "persimmon", "biogpt",
        "xglm", "nemotron", "helium", "exaone4", "arcee", "apertus", "seed_oss", "ministral",
        "hunyuan_v1_dense", "ernie4_5", "diffllama", "bitnet", "mixtral", "qwen2_moe",
        "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "glm4_moe", "mamba", "falcon_mamba",
        "lfm2", "minimax", "nemotron_h", "bamba", "granitemoehybrid", "recurrent_gemma",
        "qwen3_next", "bert", "roberta", "electra", "albert", "distilbert", "deberta",
        "camembert", "ernie", "modernbert", "mobilebert", "convbert", "nystromformer",
        "roformer", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "blenderbot", "m2m_100",
        "plbart", "bigbird_pegasus", "deberta-v2", "xlm-roberta",
    )},
}  # fmt: skip
# Before transformers 5 the experts of most families are a list of modules.
EXPERTS_ARE_PARAMETERS = (installed("transformers") or ()) >= (5,)
_CLASSES = (AutoModelForSeq2SeqLM, AutoModelForCausalLM, AutoModelForMaskedLM)
_ENCODERS = frozenset(
    ("bert", "roberta", "electra", "camembert", "ernie", "roformer", "xlm-roberta", "deberta-v2")
)


def tiny_config(name: str, **sizes: int) -> Any:
    """The family's config, every size that it knows made small, or what `sizes` says."""
    known = AutoConfig.for_model(name)
    sizes = {key: value for key, value in {**_SIZES, **sizes}.items() if hasattr(known, key)}
    return AutoConfig.for_model(name, **{**sizes, "use_cache": False, **FAMILIES[name]})


def tiny_model(name: str, **sizes: int) -> nn.Module:
    """A random model of the family in float32, in evaluation mode."""
    torch.manual_seed(0)
    config = tiny_config(name, **sizes)
    config._experts_implementation = "eager"
    classes = (AutoModelForMaskedLM,) if name in _ENCODERS else _CLASSES
    for auto in classes:
        if type(config) in auto._model_mapping:
            return auto.from_config(config).eval()
    raise ValueError(f"name must be a language model, got {name}")


def inputs(samples: int = 2, tokens: int = 9) -> dict[str, Tensor]:
    ids = torch.randint(
        3, VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(3)
    )
    return {"input_ids": ids, "labels": ids}
