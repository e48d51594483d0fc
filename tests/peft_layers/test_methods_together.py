"""Methods that are PEFT's or a few lines of torch, around and between accelerated layers.

Each model is run twice from the same state, with stock LoRA layers and with accelerated ones: the
outputs and all gradients agree, and the accelerated layers really ran fused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lora_models import quantised
from peft import (
    FourierFTConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import lora_fast
from bench.instruments.accuracy import RUN_DIFFERENCE, assert_agree
from lora_fast.trainable import mark_bitfit, mark_layer_norm

# PEFT adapts one model twice, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:(Already found|You are trying)")

HIDDEN, VOCABULARY = 32, 40
Gradients = dict[str, Tensor]


class Bottleneck(nn.Module):
    """A block and a bottleneck adapter behind it: y + up(gelu(down(y))) (Houlsby et al. 2019)."""

    def __init__(self, block: nn.Module, width: int, bottleneck: int = 6) -> None:
        super().__init__()
        self.block = block
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        nn.init.normal_(self.up.weight, std=0.1)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = self.block(*args, **kwargs)
        return y + self.up(nn.functional.gelu(self.down(y)))


def bert() -> Any:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config)


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def with_lora(model: Any, targets: list[str] | None = None, **options: Any) -> Any:
    """LoRA injected with B ≠ 0; everything else of the model stays as it trains or does not."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    names = targets or ["query", "value", "intermediate.dense", "q_proj", "v_proj", "up_proj"]
    config = LoraConfig(r=4, target_modules=names, init_lora_weights=False, **options)
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad or id(parameter) in trained)
    return model


def frozen(model: Any) -> Any:
    return model.requires_grad_(False)


def quantised_linears(model: Any, names: tuple[str, ...]) -> Any:
    """The linear layers of these names in NF4, marked as PEFT expects it."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in names and isinstance(child, nn.Linear):
                holder = nn.Module()
                holder.layer = child
                setattr(module, name, quantised(holder).layer)
    model.is_loaded_in_4bit = True
    return model


def prompt_over_lora(base: Any, config: Any) -> Any:
    """Prompt learning around a model whose linear layers have LoRA: both train."""
    model = get_peft_model(with_lora(frozen(base)), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    return model


def fourier_beside_lora(base: Any) -> Any:
    """FourierFT on the keys and the outputs, LoRA elsewhere, in one model."""
    model = frozen(base)
    config = FourierFTConfig(
        n_frequency=30, scaling=20.0, target_modules=["key", "output.dense", "k_proj", "down_proj"]
    )
    inject_adapter_in_model(config, model)
    return with_lora(model)


def bottleneck_over_lora(base: Any) -> Any:
    model = with_lora(frozen(base))
    for layer in model.bert.encoder.layer:
        layer.attention.output = Bottleneck(layer.attention.output, HIDDEN)
        layer.output = Bottleneck(layer.output, HIDDEN)
    return model


def probe_over_lora(base: Any) -> Any:
    """A head that trains on layers whose adapters are frozen: linear probing of a tuned model."""
    model = frozen(with_lora(base))
    model.classifier.requires_grad_(True)
    return model


def biases_beside_lora(base: Any) -> Any:
    model = with_lora(base)
    mark_bitfit(model, keep=["lora_A", "lora_B"])
    return model


def norms_beside_lora(base: Any) -> Any:
    model = with_lora(base)
    mark_layer_norm(model, keep=["lora_A", "lora_B"])
    return model


COMBINATIONS: dict[str, Callable[[], Any]] = {
    "fourierft, bert": lambda: fourier_beside_lora(bert()),
    "fourierft, llama": lambda: fourier_beside_lora(llama()),
    "bottleneck": lambda: bottleneck_over_lora(bert()),
    "bottleneck, nf4": lambda: bottleneck_over_lora(
        quantised_linears(bert(), ("query", "key", "value"))
    ),
    "prompt, bert": lambda: prompt_over_lora(
        bert(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
    ),
    "prompt, llama": lambda: prompt_over_lora(
        llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ),
    "prefix, llama": lambda: prompt_over_lora(
        llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ),
    "linear probe": lambda: probe_over_lora(bert()),
    "bitfit": lambda: biases_beside_lora(bert()),
    "layer norm": lambda: norms_beside_lora(bert()),
    "layer norm, llama": lambda: norms_beside_lora(llama()),
}


if "past_key_values" in inspect.signature(BertModel.forward).parameters:
    # PEFT looks for that name, which transformers 5.24 calls another.
    COMBINATIONS["prefix, bert"] = lambda: prompt_over_lora(
        bert(), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
    )


def gradients(model: Any) -> tuple[Tensor, Gradients]:
    """The logits, and the gradient of the loss for everything that trains."""
    model.train()
    ids = torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    classifies = any("classifier" in name for name, _ in model.named_parameters())
    labels = torch.tensor([0, 1, 1]) if classifies else ids
    model.zero_grad()
    found = model(input_ids=ids, attention_mask=mask, labels=labels)
    found.loss.backward()
    return found.logits.detach(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }


@pytest.mark.parametrize("name", COMBINATIONS)
def test_accelerated_layers_change_nothing(name: str) -> None:
    stock = COMBINATIONS[name]()
    fused = lora_fast.accelerate(copy.deepcopy(stock))
    expected, expected_gradients = gradients(stock)
    actual, actual_gradients = gradients(fused)
    assert_agree(actual, expected, within=RUN_DIFFERENCE)
    assert actual_gradients.keys() == expected_gradients.keys()
    assert actual_gradients
    # Some gradients are zero but for rounding: softmax does not see the bias of the keys.
    largest = max(gradient.norm().item() for gradient in expected_gradients.values())
    for parameter, gradient in expected_gradients.items():
        assert_agree(
            actual_gradients[parameter], gradient, within=RUN_DIFFERENCE, beside=largest,
            name=parameter,
        )  # fmt: skip
    lora = [layer for layer in lora_fast.report(fused).layers if layer.kind.startswith("lora.")]
    assert lora
    assert all(layer.fused and layer.fused_calls == 1 for layer in lora)
    assert not any(layer.fallback_calls for layer in lora)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_everything_that_trains_gets_a_gradient(name: str) -> None:
    model = lora_fast.accelerate(COMBINATIONS[name]())
    _, found = gradients(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == trained
    assert all(gradient.isfinite().all() for gradient in found.values())
    kinds = {"lora_A", "lora_B"} if "probe" not in name else {"classifier"}
    assert all(any(kind in n for n in trained) for kind in kinds)
    assert any("lora_" not in n for n in trained)


def test_steps_of_training_stay_together() -> None:
    stock = bottleneck_over_lora(bert())
    fused = lora_fast.accelerate(copy.deepcopy(stock))
    losses = []
    for model in (stock, fused):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        curve = []
        for _ in range(4):
            logits, _ = gradients(model)
            optimizer.step()
            curve.append(logits)
        losses.append(torch.stack(curve))
    assert not torch.allclose(losses[0][0], losses[0][-1], atol=1e-2)
    assert_agree(losses[1], losses[0], within=RUN_DIFFERENCE)
