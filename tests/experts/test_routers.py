"""Routers are found in every family, whatever they are called inside, and nothing else is."""

from __future__ import annotations

import pytest
from model_families import EXPERTS_ARE_PARAMETERS
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lora_fast.experts.routers import is_router, routers
from lora_fast.skeleton import skeleton

# What the first block of experts calls its routers, and the layers inside them.
ROUTERS = {
    "qwen3_moe": ["gate"],
    "qwen2_moe": ["gate", "shared_expert_gate"],
    "mixtral": ["gate"],
    "gpt_oss": ["router"],
    "llama4_text": ["router"],
    "phimoe": ["router" if EXPERTS_ARE_PARAMETERS else "gate"],
    "jetmoe": ["router"],
    "afmoe": ["router"],
    "zaya": ["gate"],
}


def model_of(family: str) -> nn.Module:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {family}")
    config = AutoConfig.for_model(family)
    return skeleton(config, "causal-lm")


@pytest.mark.parametrize("family", ROUTERS)
def test_routers_of_a_family(family: str) -> None:
    model = model_of(family)
    modules = dict(model.named_modules())
    found = routers(model)
    first = found[0].rpartition(".")[0]
    assert [n.rpartition(".")[2] for n in found if n.startswith(f"{first}.")] == ROUTERS[family]
    inside = [name for name in modules if any(name.startswith(f"{f}.") for f in found)]
    assert {name for name in modules if is_router(name, modules)} == {*found, *inside}


def test_a_gate_of_an_mlp_or_of_attention_is_none() -> None:
    assert routers(model_of("llama")) == []
    found = routers(model_of("afmoe"))
    assert found and not any("self_attn" in name for name in found)
