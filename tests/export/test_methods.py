"""Every method, merged into every kind of base, against PEFT's ``merge_and_unload`` in float64.

A tied base is compared with its untied twin, whose two weights have the same values: adapters of
the output layer alone, PEFT adds to both.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import adapted, load
from peft import PeftModel
from safetensors.torch import load_file
from tiny_runs import save_llama
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import lora_fast
from bench.instruments.accuracy import assert_accurate
from lora_fast.export import merge_checkpoint
from lora_fast.methods.table import METHODS
from lora_fast.training.weights import base_weights, load_weights, save_weights, trained, unwrapped

DESIGNED = (
    "lora", "rslora", "lora-plus", "lora-fa", "vera", "dora", "adalora", "delta-lora", "ia3",
    "bitfit",
)  # fmt: skip
TARGETS = {"linear": "all-linear", "head": "q_proj,down_proj,lm_head"}


def _cases() -> list[Any]:
    """Method × weights × tied × files × targets; the suite runs each method in three bases."""
    found, number = [], 0
    for method in DESIGNED:
        targets = TARGETS if "target_modules" in METHODS[method].options else {"linear": None}
        for values in [
            (weights, tied, files, target)
            for weights in ("dense", "nf4")
            for tied in ("tied", "untied")
            for files in ("one-file", "shards")
            for target in targets
        ]:
            usual = number % 7 == 0 or values == ("dense", "tied", "shards", "head")
            marks = [] if usual else [pytest.mark.exhaustive]
            found.append(pytest.param(method, *values, id="-".join((method, *values)), marks=marks))
            number += 1
    return found


def test_the_suite_runs_every_method_and_no_more_than_thirty_cases() -> None:
    usual = [case.values for case in _cases() if not case.marks]
    assert {values[0] for values in usual} == set(DESIGNED) and len(usual) <= 30
    assert {values[1] for values in usual} == {"dense", "nf4"}
    assert {values[2] for values in usual} == {"tied", "untied"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders WEIGHTS-TIED-FILES, and the dense, untied twin of each in twin-WEIGHTS-TIED."""
    folder = tmp_path_factory.mktemp("bases")
    save_llama(folder / "llama")
    for tied in ("tied", "untied"):
        config = AutoConfig.from_pretrained(folder / "llama")
        config.tie_word_embeddings = tied == "tied"
        config.attention_bias = True
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
        dense = folder / f"dense-{tied}-one-file"
        _save(model, dense, folder / "llama")
        quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        nf4 = AutoModelForCausalLM.from_pretrained(dense, quantization_config=quantisation)
        _save(nf4, folder / f"nf4-{tied}-one-file", folder / "llama")
        _save(_untied(load(dense)), folder / f"twin-dense-{tied}", folder / "llama")
        _save(_untied(_decoded(nf4, load(dense))), folder / f"twin-nf4-{tied}", folder / "llama")
    return folder


def _save(model: Any, folder: Path, tokenizer: Path, **options: Any) -> None:
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "config*"))
    model.save_pretrained(folder, **options)
    if "one-file" in folder.name:
        shards = folder.with_name(folder.name.replace("one-file", "shards"))
        _save(model, shards, tokenizer, max_shard_size="30KB")
        assert (shards / "model.safetensors.index.json").exists()


def _untied(model: Any) -> Any:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


def _decoded(quantised: Any, dense: Any) -> Any:
    for name, layer in quantised.named_modules():
        if type(layer).__name__ == "Linear4bit":
            weight = lora_fast.NF4Weight.from_params4bit(layer.weight).dequantize(torch.float32)
            dense.get_submodule(name).weight.data = weight
    return dense


def _leave(model: Any, method: str, folder: Path) -> None:
    """The files of a run."""
    folder.mkdir()
    if METHODS[method].peft:
        model.save_pretrained(folder, save_embedding_layers=False)
    if METHODS[method].changes_weights:
        moved = base_weights(model)
        for tensor in moved.values():
            tensor.add_(0.5)
        save_weights(unwrapped(moved), folder / "weights.safetensors")
    elif not METHODS[method].peft:
        save_weights(trained(model), folder / "weights.safetensors")


def _by_peft(twin: Path, method: str, adapter: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    model = load(twin)
    weights = adapter / "weights.safetensors"
    if weights.exists():
        load_weights(model, weights)
        if "-tied" in twin.name and "lm_head" in str(load_file(weights).keys()):
            # Training changed the one weight that both places share.
            model.model.embed_tokens.weight.data = model.lm_head.weight.data.clone()
    model = model.to(dtype)
    if METHODS[method].peft:
        model = PeftModel.from_pretrained(model, adapter).to(dtype).merge_and_unload()
    return model.state_dict()


@pytest.mark.parametrize(("method", "weights", "tied", "files", "target"), _cases())
def test_merged_as_in_float64(
    method: str, weights: str, tied: str, files: str, target: str, bases: Path, tmp_path: Path
) -> None:
    twin, adapter = bases / f"twin-{weights}-{tied}", tmp_path / "adapter"
    model = adapted(twin, method, torch.float32, targets=TARGETS[target])
    _leave(model, method, adapter)
    out = merge_checkpoint(str(bases / f"{weights}-{tied}-{files}"), adapter, tmp_path / "out",
                           max_shard_size="40KB" if files == "shards" else "1GB",
                           note=lambda line: None)  # fmt: skip
    ours = load(out).state_dict()
    exact = _by_peft(twin, method, adapter, torch.float64)
    eager = _by_peft(twin, method, adapter, torch.float32)
    assert ours.keys() == exact.keys()
    for name, tensor in ours.items():
        assert_accurate(tensor, exact[name], eager[name], name=name)
    untied = tied == "untied" or target == "head"
    assert load(out).config.tie_word_embeddings is not untied
    before = load(twin).state_dict()
    assert any(not torch.equal(ours[name], before[name]) for name in ours)
