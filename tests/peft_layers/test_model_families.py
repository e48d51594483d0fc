"""Tiny models of the families that users train: as stock PEFT, with the groups that each has."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from lora_models import accelerated_copy, compare, counted, lora_layers
from model_families import inputs, tiny_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.models.bert import modeling_bert as bert

import lora_fast
from bench.instruments.accuracy import assert_models_agree

HIDDEN, LAYERS, TOKENS = 32, 2, 6


@dataclasses.dataclass(frozen=True)
class Family:
    """Options of its configuration beside those of all, linear layers and groups of a block."""

    options: dict[str, Any]
    linears: int
    groups: tuple[int, ...]


LLAMA_LIKE = {"num_key_value_heads": 2, "head_dim": 8}
# q, k, v and gate, up. Phi has no gate; Phi-3 and GPT-NeoX have one layer for q, k and v (Phi-3
# another for gate and up), and so nothing to share.
FAMILIES = {
    "llama": Family(LLAMA_LIKE, 7, (3, 2)),
    "mistral": Family(LLAMA_LIKE, 7, (3, 2)),
    "qwen2": Family({"num_key_value_heads": 2}, 7, (3, 2)),
    "qwen3": Family(LLAMA_LIKE, 7, (3, 2)),
    "gemma": Family(LLAMA_LIKE, 7, (3, 2)),
    "gemma2": Family(LLAMA_LIKE, 7, (3, 2)),
    "phi": Family({}, 6, (3,)),
    "phi3": Family({"num_key_value_heads": 2, "pad_token_id": 0}, 4, ()),
    "gpt_neox": Family({}, 4, ()),
    # transformers 4 has one class for self- and cross-attention, where q may have another input.
    "bert": Family(
        {"add_pooling_layer": False}, 6, (3,) if hasattr(bert, "BertCrossAttention") else (2,)
    ),
}


class OfEmbeddings(nn.Module):
    """The last hidden state [B, T, hidden], from x [B, T, hidden] in place of tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x).last_hidden_state


def stock_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    options = dict(FAMILIES[name].options)
    build = {key: options.pop(key) for key in ("add_pooling_layer",) if key in options}
    config = AutoConfig.for_model(
        name, vocab_size=16, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=16, **options,
    )  # fmt: skip
    base = AutoModel.from_config(config, attn_implementation="eager", **build)
    # Small updates: the rule is one of operations, and a model of several amplifies a difference.
    lora = LoraConfig(r=4, lora_alpha=0.4, target_modules="all-linear", init_lora_weights=False)
    return OfEmbeddings(get_peft_model(base, lora).eval())


@pytest.mark.parametrize("name", FAMILIES)
def test_values_gradients_and_groups(name: str, grouped: list[int]) -> None:
    family, stock = FAMILIES[name], stock_model(name)
    assert len(lora_layers(stock)) == LAYERS * family.linears
    # As one operation, gate and up need no group.
    fused = lora_fast.accelerate(copy.deepcopy(stock), fuse_mlp=False)
    compare(fused, stock, torch.randn(2, TOKENS, HIDDEN), compute_dtype=torch.float32)
    assert grouped == list(family.groups) * LAYERS
    assert counted(fused) == (LAYERS * family.linears, {})


# Layers that read the same input in gated delta nets and in multi-head latent attention, their
# widths unlike; of a layer each, and how many layers of the model have them.
SIBLINGS = {
    "qwen3_next": (("in_proj_qkvz", "in_proj_ba"), LAYERS),
    "qwen3_5_text": (("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), LAYERS),
    "deepseek_v2": (("q_a_proj", "kv_a_proj_with_mqa"), LAYERS),
    "deepseek_v3": (("q_a_proj", "kv_a_proj_with_mqa"), LAYERS),
}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", [name for name in SIBLINGS if name in MODEL_MAPPING_NAMES])
def test_projections_of_one_input(name: str, checkpointed: bool, grouped: list[int]) -> None:
    siblings, layers = SIBLINGS[name]
    targets = [*siblings, "out_proj", "kv_b_proj", "o_proj"]
    lora = LoraConfig(r=2, lora_alpha=0.4, target_modules=targets, init_lora_weights=False)
    stock = get_peft_model(tiny_model(name), lora).train()
    fused, results = accelerated_copy(stock), []
    for model in (fused, stock):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        found = model(**inputs())
        found.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append({"logits": found.logits.detach(), **grads})
    # transformers 5.15 puts a function around the forward of a delta net that does not name it.
    forwards = [type(m).forward for m in fused.modules() if siblings[0] in m._modules]
    assert len(forwards) == layers
    passes = (2 if checkpointed else 1) if forwards[0].__name__ == "forward" else 0
    assert grouped == [len(siblings)] * layers * passes
    assert lora_fast.report(fused).all_fused
    assert_models_agree(*results)
