"""Loading, quantising and adapting base models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from expert_models import FUSES, expert_base
from peft.tuners import lora
from tiny_runs import save_bert, save_llama
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fast
from lora_fast.errors import TrainingError
from lora_fast.experts.quantisation import expert_parameters
from lora_fast.training import models
from lora_fast.training.config import TrainConfig

LABELS = ["no", "yes"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


def config(model: Path, **options: Any) -> TrainConfig:
    given = TrainConfig(**{"model": str(model), "data": "d.jsonl", **options})
    return given.with_defaults(10)


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def test_nf4_takes_every_linear_layer_but_the_head(bert: Path) -> None:
    base = models.load_base(config(bert), LABELS)
    found = kinds(base.model)
    assert base.quantized
    assert found["classifier"] is nn.Linear
    linears = {k for k, v in found.items() if issubclass(v, nn.Linear)} - {"classifier"}
    assert len(linears) == 13
    assert {found[name] for name in linears} == {bnb.nn.Linear4bit}
    state = base.model.get_submodule("bert.pooler.dense").weight.quant_state
    assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
    assert base.model.config.id2label == {0: "no", 1: "yes"}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mixture"
    save_llama(folder)
    experts = expert_base("qwen3_moe", vocab_size=LlamaConfig.from_pretrained(folder).vocab_size)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    experts.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not FUSES, reason="needs PEFT 0.19.1 and transformers' flags")
@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_experts_are_quantised_and_adapted(
    mixture: Path, quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_is_left_to_do(model: Any) -> None:
        assert not any(map(expert_parameters, model.modules()))

    monkeypatch.setattr(models, "quantize_experts", nothing_is_left_to_do)
    run = config(mixture, task="causal-lm", quantize=quantize, experts=True, r=2)
    base = models.load_base(run, [])
    size = models.base_parameters(expert_base("qwen3_moe", vocab_size=base.model.vocab_size))
    assert models.base_parameters(base.model) == size
    model = lora_fast.accelerate(models.add_adapter(base, run, 10))
    ids = torch.tensor([[1, 5, 7, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    lines = {line.name: line for line in lora_fast.report(model).layers}
    experts = [line for name, line in lines.items() if ".experts" in name]
    assert len(experts) == 4  # two parameters in each of two layers
    for line in experts:
        assert (line.fused_calls, line.base) == (1, "nf4" if quantize == "nf4" else "float32")
    assert any("q_proj" in name for name in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "vera"}, "--method vera takes no --experts"),
        ({"dropout": 0.1}, "--experts needs --dropout 0"),
    ],
)
def test_experts_that_cannot_be_adapted(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainConfig(model="m", data="d.jsonl", experts=True, **options)


def test_a_model_without_experts(bert: Path) -> None:
    run = config(bert, experts=True)
    with pytest.raises(TrainingError, match="has no experts that are parameters"):
        models.add_adapter(models.load_base(run, LABELS), run, 10)


def test_unquantised(bert: Path) -> None:
    base = models.load_base(config(bert, quantize="none"), LABELS)
    assert not base.quantized
    assert bnb.nn.Linear4bit not in kinds(base.model).values()
    assert base.dtype == torch.float32


def test_parameters_are_counted_as_if_unquantised(bert: Path) -> None:
    counts = [
        models.base_parameters(models.load_base(config(bert, quantize=q), LABELS).model)
        for q in ("nf4", "none")
    ]
    assert counts[0] == counts[1]


def test_weights_absent_from_the_checkpoint_are_not_frozen_in_four_bits(tmp_path: Path) -> None:
    # Nobody could load random 4-bit weights again: the pooler must be saved, so it must train.
    given = config(save_bert(tmp_path, pooler=False))
    base = models.load_base(given, LABELS)
    assert base.new_modules == ["bert.pooler.dense"]
    assert kinds(base.model)["bert.pooler.dense"] is nn.Linear
    model = models.add_adapter(base, given, 4)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("pooler.dense.modules_to_save" in name for name in trained)
    assert not any("pooler" in name and "lora" in name for name in trained)


def test_a_head_for_another_number_of_labels_is_replaced(tmp_path: Path, bert: Path) -> None:
    three = models.load_base(config(bert, quantize="none"), ["a", "b", "c"])
    three.model.save_pretrained(tmp_path)
    three.tokenizer.save_pretrained(tmp_path)
    assert models.load_base(config(tmp_path), LABELS).model.classifier.out_features == 2


def test_every_linear_layer_is_adapted_in_float32(bert: Path) -> None:
    given = config(bert, dtype="bfloat16", r=4)
    model = models.add_adapter(models.load_base(given, LABELS), given, 4)
    layers = [m for m in model.modules() if isinstance(m, lora.LoraLayer)]
    assert len(layers) == 13
    trainable = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    assert set(trainable.values()) == {torch.float32}
    assert {n.rpartition(".")[2] for n in trainable if "classifier" in n} == {"weight", "bias"}
    embeddings = model.get_submodule("base_model.model.bert.embeddings.word_embeddings")
    assert embeddings.weight.dtype == torch.bfloat16


def test_the_language_model_head_is_neither_quantised_nor_adapted(llama: Path) -> None:
    given = config(llama, task="causal-lm")
    base = models.load_base(given, [])
    assert base.new_modules == []
    assert kinds(base.model)["lm_head"] is nn.Linear
    assert base.tokenizer.pad_token == base.tokenizer.eos_token
    model = models.add_adapter(base, given, 4)
    assert sum(isinstance(m, lora.bnb.Linear4bit) for m in model.modules()) == 14
    trainable, total = models.parameter_counts(model)
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total > models.base_parameters(base.model) - trainable


def test_absent_weights_of_a_language_model_leave_its_head_alone(
    llama: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(llama)
    weights = model.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    models.load_tokenizer(str(llama)).save_pretrained(tmp_path)
    base = models.load_base(config(tmp_path, task="causal-lm"), [])
    found = kinds(base.model)
    assert base.new_modules == ["model.layers.1.mlp.up_proj"]
    assert found["lm_head"] is found["model.layers.1.mlp.up_proj"] is nn.Linear
    assert found["model.layers.0.mlp.up_proj"] is bnb.nn.Linear4bit


def test_initial_weights_depend_on_the_seed(bert: Path) -> None:
    def head(seed: int) -> torch.Tensor:
        return models.load_base(config(bert, seed=seed), LABELS).model.classifier.weight

    assert torch.equal(head(0), head(0))
    assert not torch.equal(head(0), head(1))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("query,quary", "the model has no module 'quary'; it has classifier, dense, key, query"),
        ("LayerNorm", "'LayerNorm' must be a linear layer, got LayerNorm"),
        ("uery", "the model has no module 'uery'"),
        (" , ", "must be all-linear or a list of names, got none"),
    ],
)
def test_target_modules_that_cannot_be(bert: Path, wanted: str, message: str) -> None:
    given = config(bert, target_modules=wanted)
    with pytest.raises(TrainingError, match=f"--target-modules.* {message}"):
        models.add_adapter(models.load_base(given, LABELS), given, 4)


def test_target_modules_by_name(bert: Path) -> None:
    given = config(bert, target_modules="query, attention.output.dense")
    model = models.add_adapter(models.load_base(given, LABELS), given, 4)
    names = [n for n, m in model.named_modules() if isinstance(m, lora.LoraLayer)]
    assert len(names) == 4
    assert all(n.endswith(("query", "attention.output.dense")) for n in names)


def test_models_that_cannot_be_read(tmp_path: Path, bert: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = save_bert(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    unfinished = save_bert(tmp_path / "unfinished")
    (unfinished / "tokenizer.json").unlink()
    (unfinished / "tokenizer_config.json").unlink()
    for folder, message in [
        (tmp_path / "empty", "(--model|cannot load the tokenizer of)"),
        (tmp_path / "absent", "--model"),
        (unfinished, "cannot load the tokenizer of"),
        (broken, "--model"),
    ]:
        with pytest.raises(
            TrainingError, match=f"^{message} {folder}( cannot be loaded)?: .+"
        ) as caught:
            models.load_base(config(folder), LABELS)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_without_padding_and_end(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.eos_token = None
    LlamaForCausalLM(LlamaConfig.from_pretrained(llama)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match="must have a padding or end token, got none"):
        models.load_tokenizer(str(tmp_path))


def test_how_many_tokens_fit(bert: Path) -> None:
    assert models.position_limit(models.load_base(config(bert), LABELS)) == 48


def test_float16_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="--dtype float16 needs a GPU"):
        models.choose_device_and_dtype("float16")
    assert models.choose_device_and_dtype("auto") == (torch.device("cpu"), torch.float32)
