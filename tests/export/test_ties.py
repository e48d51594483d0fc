"""Adapters of tied embeddings, merged: the model that PEFT computes, untied in weights and config.

PEFT's own ``merge_and_unload`` adds an adapter of one place to the weight that both have; what its
loaded model computes before that is what was trained, and the yardstick here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from bench.instruments.accuracy import assert_accurate
from lora_fast.export import merge_checkpoint

IDS = torch.arange(3, 12)[None]
SIZES = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
T5_SIZES = {"vocab_size": 24, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, tie_word_embeddings=True))


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=32, n_layer=1, n_head=2))


def t5() -> Any:
    return T5ForConditionalGeneration(T5Config(**T5_SIZES, decoder_start_token_id=0))


def umt5() -> Any:
    return UMT5ForConditionalGeneration(UMT5Config(**T5_SIZES, decoder_start_token_id=0))


def switch() -> Any:
    """Its forward pass scales what it feeds to a head that the config calls tied."""
    config = SwitchTransformersConfig(
        **T5_SIZES,
        num_sparse_encoder_layers=0,
        num_sparse_decoder_layers=0,
        decoder_start_token_id=0,
    )
    return SwitchTransformersForConditionalGeneration(config)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    seq2seq = any(make.__name__ in folder.parts for make in NO_OPTION)
    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    decoder = {"decoder_input_ids": IDS[:, :4]} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=IDS, **decoder).logits


def disturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=list(targets), **options)


def q(**options: Any) -> LoraConfig:
    return lora("q_proj", **options)


def tied(**options: Any) -> dict[str, Any]:
    return {"ensure_weight_tying": True, **options}


# name: (the base, PEFT's config, whether its two places end with one value)
CASES: dict[str, tuple[Callable[[], Any], Any, bool]] = {
    "saved-embedding": (llama, q(modules_to_save=["embed_tokens"]), False),
    "saved-head": (llama, q(modules_to_save=["lm_head"]), False),
    "saved-both": (llama, q(modules_to_save=["embed_tokens", "lm_head"]), False),
    "saved-tied": (llama, q(**tied(modules_to_save=["embed_tokens"])), True),
    "saved-head-tied": (llama, q(**tied(modules_to_save=["lm_head"])), True),
    "lora-embedding": (llama, lora("q_proj", "embed_tokens"), False),
    "lora-head": (llama, lora("q_proj", "lm_head"), False),
    "lora-both": (llama, lora("embed_tokens", "lm_head"), False),
    "lora-tied": (llama, lora("q_proj", "embed_tokens", "lm_head", **tied()), True),
    "lora-head-tied": (llama, lora("lm_head", **tied()), True),
    "dora-head": (llama, lora("lm_head", use_dora=True), False),
    "lora-head-saved-embedding": (llama, lora("lm_head", modules_to_save=["embed_tokens"]), False),
    "tokens": (llama, q(trainable_token_indices=[3, 5]), True),
    "tokens-of-the-head": (llama, q(trainable_token_indices={"lm_head": [3, 5]}), False),
    "other-tokens": (
        llama,
        q(trainable_token_indices={"lm_head": [3, 5], "embed_tokens": [4]}),
        False,
    ),
    "tokens-alone": (llama, TrainableTokensConfig(token_indices=[3, 5]), True),
    "gpt2-saved": (gpt2, lora("c_proj", modules_to_save=["wte"], fan_in_fan_out=True), False),
    "gpt2-lora": (gpt2, lora("lm_head"), False),
    "t5-saved": (t5, lora("q", modules_to_save=["shared"]), False),
    "t5-head": (t5, lora("lm_head"), False),
    "umt5-head": (umt5, lora("lm_head"), False),
    "switch-head": (switch, lora("lm_head"), False),
}
# Their configs have no value that unties the places and does nothing else.
NO_OPTION = (t5, umt5, switch)


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_computes_what_was_trained(case: str, tmp_path: Path) -> None:
    make, config, one_value = CASES[case]
    family = tmp_path / make.__name__
    make().save_pretrained(family / "base")
    model = get_peft_model(load(family / "base"), copy.deepcopy(config))
    disturb(model)
    model.save_pretrained(family / "adapter")

    notes: list[str] = []
    out = merge_checkpoint(
        str(family / "base"), family / "adapter", family / "out", note=notes.append
    )
    stock = PeftModel.from_pretrained(load(family / "base"), family / "adapter")
    exact = PeftModel.from_pretrained(load(family / "base", torch.float64), family / "adapter")
    merged = load(out)
    assert_accurate(
        logits(merged), logits(exact.double()).double(), logits(stock), name=f"logits of {case}"
    )
    stored = load_file(out / "model.safetensors")
    before = load_file(family / "base" / "model.safetensors")
    assert (stored.keys() == before.keys()) == one_value
    tie = merged.config.tie_word_embeddings
    assert tie is (one_value or make in NO_OPTION)
    if one_value:
        assert notes == []
    elif make in NO_OPTION:
        assert "has no option" in notes[0]
    else:
        assert notes[0].startswith("no longer tied, since their values differ now: ")


def test_weights_that_are_tied_beside_those_untied_are_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The option unties everything: what stays equal is written in each of its places."""

    attention = "model.layers.0.self_attn"
    pairs = {"lm_head.weight": "model.embed_tokens.weight"}
    pairs[f"{attention}.k_proj.weight"] = f"{attention}.v_proj.weight"
    monkeypatch.setattr(LlamaForCausalLM, "_tied_weights_keys", pairs)
    llama().save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base")
    assert base.get_parameter(f"{attention}.k_proj.weight") is base.get_parameter(
        f"{attention}.v_proj.weight"
    )
    model = get_peft_model(base, lora("lm_head"))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    out = merge_checkpoint(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    found = load_file(out / "model.safetensors")
    assert torch.equal(found[f"{attention}.k_proj.weight"], found[f"{attention}.v_proj.weight"])
    assert "lm_head.weight" in found and "model.embed_tokens.weight" in found


@pytest.mark.parametrize("indices", [[3, 24], [-1], [3, 3], [1.5]])
def test_tokens_that_the_embedding_does_not_have_are_refused(
    indices: list[Any], tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(load(tmp_path / "base"), q(trainable_token_indices=list(range(2))))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    options = json.loads(path.read_text()) | {"trainable_token_indices": indices}
    path.write_text(json.dumps(options))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(key for key in tensors if key.endswith("trainable_tokens_delta"))
    save_file({**tensors, key: tensors[key][:1].expand(len(indices), -1).contiguous()}, weights)
    with pytest.raises(ValueError, match=r"trainable tokens must be|must fit the base"):
        merge_checkpoint(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
