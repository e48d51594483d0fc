"""Tiny mixtures of experts with adapters on the experts, of many families of transformers."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from model_families import EXPERTS_ARE_PARAMETERS, FAMILIES, inputs, tiny_config
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import lora_fast
from lora_fast.features import installed

try:
    from transformers.integrations import moe
except ImportError:  # before transformers 5
    moe = None  # type: ignore[assignment]

_FLAGS = {"is_transposed", "has_bias", "has_gate"}
R = 3  # not the number of experts
# Whether PEFT and transformers have what the fused path reads.
FUSES = (
    EXPERTS_ARE_PARAMETERS
    and (installed("peft") or ()) >= (0, 19, 1)
    and set(inspect.signature(getattr(moe, "use_experts_implementation", id)).parameters) >= _FLAGS
)
# Their own layouts: halves, interleaved and transposed with a bias and a clamped gate, no gate.
TYPICAL = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "nemotron_h")
OTHERS = (
    *("granitemoe", "qwen3_next", "glm4_moe", "gemma4_text", "ernie4_5_moe", "minimax"),
    *("lfm2_moe", "hunyuan_v1_moe"),
)
_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4,
    "moe_intermediate_size": 16, "max_position_embeddings": 64, "use_cache": False,
}  # fmt: skip
# Configs whose sizes depend on more than their names.
_OWN: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "enable_moe_block": True, "top_k_experts": 2, "head_dim": 8, "global_head_dim": 8,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "lfm2_moe": {
        "num_experts_per_tok": 2, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"],
    },
}  # fmt: skip


def expert_base(family: str, implementation: str | None = "eager", **options: Any) -> Any:
    """A random model in float32, in training mode."""
    torch.manual_seed(0)
    if family in _OWN:
        config = AutoConfig.for_model(family, **{**_SIZES, **_OWN[family], **options})
    else:
        FAMILIES.setdefault(family, {})
        config = tiny_config(family)
        for key, value in options.items():
            setattr(config, key, value)
    config._experts_implementation = implementation
    return AutoModelForCausalLM.from_config(config).train()


def expert_parameters(model: nn.Module) -> list[str]:
    """What to target: experts.gate_up_proj, …"""
    found = set()
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and key.endswith("_proj") and name.endswith("experts"):
                found.add(f"{name.rpartition('.')[2]}.{key}")
    return sorted(found)


def adapted(base: nn.Module, targets: list[str] | None = None, **config: Any) -> Any:
    """PEFT's model with A and B ≠ 0 on the experts alone."""
    options = {"r": R, "lora_alpha": 5, "target_modules": [], "init_lora_weights": False}
    lora = LoraConfig(target_parameters=targets or expert_parameters(base), **{**options, **config})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base, lora)


def pair(family: str, **options: Any) -> tuple[Any, Any]:
    """The same model, stock and accelerated."""
    stock = adapted(expert_base(family, **options))
    return stock, lora_fast.accelerate(copy.deepcopy(stock))


def fused_blocks(family: str) -> tuple[nn.Module, nn.Module]:
    """The first module around experts of :func:`pair`; skips where nothing fuses them."""
    if not FUSES:
        pytest.skip("PEFT or transformers lacks what experts need")
    stock, fused = (
        next(m for m in model.modules() if hasattr(m, "experts")) for model in pair(family)
    )
    return stock, fused


def results(model: nn.Module, **sizes: int) -> dict[str, Tensor | None]:
    """Loss, logits and every gradient."""
    model.zero_grad()
    output = model(**inputs(**sizes))
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **gradients}


def wrappers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "parameter_name")]
