"""Merged models beside PEFT's own merging, and adapters that travel to PEFT and back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import adapted, disturb, load
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_runs import save_bert, save_llama
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

import lora_fast
from bench.instruments.accuracy import assert_accurate
from lora_fast.export import merge_checkpoint
from lora_fast.methods.table import METHODS
from lora_fast.training.weights import base_weights, save_weights, trained, unwrapped

TOKENS = torch.arange(12).reshape(2, 6) % 18
PEFT_METHODS = [name for name, method in METHODS.items() if method.peft]
UNMERGEABLE = ("fourierft", "prompt", "prefix")
# LoRA+ and Delta-LoRA leave adapters as LoRA does.
MERGEABLE = [m for m in PEFT_METHODS if m not in (*UNMERGEABLE, "lora-plus", "delta-lora")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def float64_merged(folder: Path, adapter: Path, task: str = "causal-lm") -> dict[str, Any]:
    model = PeftModel.from_pretrained(load(folder, torch.float64, task), adapter).double()
    return model.merge_and_unload().state_dict()


def assert_merged_as_by_peft(
    out: Path, folder: Path, adapter: Path, dtype: torch.dtype, task: str = "causal-lm"
) -> None:
    ours = load(out, dtype, task).state_dict()
    peft = PeftModel.from_pretrained(load(folder, dtype, task), adapter).merge_and_unload()
    eager = peft.state_dict()
    exact = float64_merged(folder, adapter, task)
    assert ours.keys() == eager.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == dtype
        assert_accurate(tensor, exact[name], eager[name].to(dtype), name=name)


@pytest.mark.parametrize("method", MERGEABLE)
def test_a_merged_model_is_peft_s(method: str, llama: Path, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if method in ("lora", "dora") else torch.float32
    base = tmp_path / "base"
    load(llama, dtype).save_pretrained(base)
    adapted(llama, method, dtype).save_pretrained(tmp_path / "adapter")
    out = merge_checkpoint(str(base), tmp_path / "adapter", tmp_path / "out")
    assert_merged_as_by_peft(out, base, tmp_path / "adapter", dtype)
    changed = load_file(out / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert changed.keys() == before.keys()
    assert any(not torch.equal(changed[name], before[name]) for name in before)


@pytest.mark.parametrize("method", UNMERGEABLE)
def test_what_has_no_formula_is_refused(method: str, llama: Path, tmp_path: Path) -> None:
    adapted(llama, method, torch.float32).save_pretrained(tmp_path / "adapter")
    with pytest.raises(NotImplementedError, match="merge"):
        merge_checkpoint(str(llama), tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_adapters_travel_to_peft_and_back(method: str, llama: Path, tmp_path: Path) -> None:
    ours = adapted(llama, method, torch.float32).eval()
    plain = ours(TOKENS).logits
    ours.save_pretrained(tmp_path / "ours")
    stock = PeftModel.from_pretrained(load(llama), tmp_path / "ours").eval()
    exact = copy.deepcopy(stock).double()(TOKENS).logits
    assert_accurate(stock(TOKENS).logits.detach(), exact.detach(), plain.detach(), name="logits")
    stock.save_pretrained(tmp_path / "stock")
    back = PeftModel.from_pretrained(load(llama), tmp_path / "stock").eval()
    if METHODS[method].fused:
        fused = lora_fast.accelerate(stock)(TOKENS).logits
        assert torch.equal(lora_fast.accelerate(back)(TOKENS).logits, fused)
        assert lora_fast.report(back).fused_calls
    first, second = (
        load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "stock")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_classifier_is_merged_with_its_head(bert: Path, tmp_path: Path) -> None:
    adapted(bert, "lora", torch.float32, "classification").save_pretrained(tmp_path / "a")
    out = merge_checkpoint(str(bert), tmp_path / "a", tmp_path / "out")
    assert_merged_as_by_peft(out, bert, tmp_path / "a", torch.float32, "classification")
    assert json.loads((out / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(bert))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules="all-linear", rank_pattern={"q_proj": 2, "down_proj": 7},
                   alpha_pattern={"k_proj": 3}, use_rslora=True),
        LoraConfig(r=3, target_modules=["o_proj"], modules_to_save=["norm"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["patterns", "modules-to-save", "ia3-feedforward"],
)  # fmt: skip
def test_configs_of_every_shape_merge_as_in_peft(config: Any, llama: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(llama), copy.deepcopy(config))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    out = merge_checkpoint(str(llama), tmp_path / "adapter", tmp_path / "out")
    assert_merged_as_by_peft(out, llama, tmp_path / "adapter", torch.float32)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, lora_bias=True),
        LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True),
        IA3Config(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ],
    ids=["lora-bias", "dora", "ia3"],
)
def test_weights_stored_the_other_way_round_and_biases_merge(config: Any, tmp_path: Path) -> None:
    gpt2 = GPT2Config(vocab_size=24, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    base = GPT2LMHeadModel(gpt2)
    disturb(base)  # its biases start at zero
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(load(tmp_path / "base"), copy.deepcopy(config))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    out = merge_checkpoint(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    assert_merged_as_by_peft(out, tmp_path / "base", tmp_path / "adapter", torch.float32)


def test_a_four_bit_base_is_decoded(llama: Path, tmp_path: Path) -> None:
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    quantised = AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.bfloat16, quantization_config=quantisation
    )
    quantised.save_pretrained(tmp_path / "base")
    dense = load(llama, torch.bfloat16)
    for name, layer in quantised.named_modules():
        if type(layer).__name__ == "Linear4bit":
            weight = lora_fast.NF4Weight.from_params4bit(layer.weight).dequantize(torch.bfloat16)
            dense.get_submodule(name).weight.data = weight
    dense.save_pretrained(tmp_path / "dense")
    adapted(llama, "lora", torch.bfloat16).save_pretrained(tmp_path / "adapter")
    out = merge_checkpoint(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    assert_merged_as_by_peft(out, tmp_path / "dense", tmp_path / "adapter", torch.bfloat16)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_weights_that_delta_lora_moved_are_merged(llama: Path, tmp_path: Path) -> None:
    model = adapted(llama, "delta-lora", torch.float32)
    moved = base_weights(model)
    for tensor in moved.values():
        tensor.add_(0.5)
    model.save_pretrained(tmp_path / "adapter")
    save_weights(unwrapped(moved), tmp_path / "adapter" / "weights.safetensors")
    out = merge_checkpoint(str(llama), tmp_path / "adapter", tmp_path / "out")
    expected = model.merge_and_unload().state_dict()
    for name, tensor in load(out).state_dict().items():
        assert_accurate(tensor, expected[name].double(), expected[name], name=name)


@pytest.mark.parametrize("method", ["bitfit", "probe"])
def test_parts_of_the_base_that_trained_take_their_place(
    method: str, bert: Path, tmp_path: Path
) -> None:
    model = adapted(bert, method, torch.float32, "classification").eval()
    (tmp_path / "adapter").mkdir()
    save_weights(trained(model), tmp_path / "adapter" / "weights.safetensors")
    out = merge_checkpoint(str(bert), tmp_path / "adapter", tmp_path / "out")
    merged = load(out, task="classification").eval()
    for name, tensor in trained(model).items():
        assert torch.equal(merged.state_dict()[name], tensor), name


def test_the_dtype_of_the_result_can_be_chosen(llama: Path, tmp_path: Path) -> None:
    adapted(llama, "lora", torch.float32).save_pretrained(tmp_path / "adapter")
    out = merge_checkpoint(str(llama), tmp_path / "adapter", tmp_path / "out", dtype="float16")
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.float16}
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float16
    full = merge_checkpoint(str(llama), tmp_path / "adapter", tmp_path / "full")
    for name, tensor in load_file(full / "model.safetensors").items():
        assert torch.equal(tensor.half(), load_file(out / "model.safetensors")[name]), name


def test_a_symlinked_cache_is_read_and_a_link_out_of_the_folder_is_not(
    llama: Path, tmp_path: Path
) -> None:
    adapted(llama, "lora", torch.float32).save_pretrained(tmp_path / "adapter")
    snapshot, blobs = tmp_path / "repo" / "snapshots" / "1", tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in llama.iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    merge_checkpoint(str(snapshot), tmp_path / "adapter", tmp_path / "out")
    (tmp_path / "linked").mkdir()
    for path in llama.iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)
    with pytest.raises(ValueError, match="must lie inside"):
        merge_checkpoint(str(tmp_path / "linked"), tmp_path / "adapter", tmp_path / "out2")


def test_weights_that_transformers_assembles_keep_their_stored_names(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    model = get_peft_model(
        load(tmp_path / "base"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    )
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    out = merge_checkpoint(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    assert_merged_as_by_peft(out, tmp_path / "base", tmp_path / "adapter", torch.float32)
    stored = [load_file(side / "model.safetensors") for side in (tmp_path / "base", out)]
    assert stored[0].keys() == stored[1].keys()
