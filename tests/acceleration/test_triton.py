"""Accelerated models on the Triton kernels: a whole QLoRA model trains, and devices change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lora_models import (
    K,
    accelerated_copy,
    counted,
    float64_copy,
    lora_config,
    nf4_linear,
    peft_model,
)
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fast
from bench.instruments.accuracy import assert_accurate, assert_all_accurate, assert_same_bits


def _qlora_llama() -> Any:
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=31,
        )
    )
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nf4_linear(linear, torch.float32))
    model.is_loaded_in_4bit = True
    return get_peft_model(model, lora_config(target_modules="all-linear", r=4))


def _train(model: Any, ids: Tensor) -> dict[str, Tensor]:
    # With the default eps of 1e-8 the rounding of a gradient near zero becomes a whole step.
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.01, eps=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.interpreter
def test_three_steps_of_adamw_on_a_two_layer_llama() -> None:
    stock, ids = _qlora_llama(), torch.randint(0, 31, (2, 9))
    ref64, eager = _train(float64_copy(stock), ids), _train(copy.deepcopy(stock), ids)
    for backend in ("triton", "torch"):
        fused = accelerated_copy(stock)
        with lora_fast.set_backend(backend):
            assert_all_accurate(_train(fused, ids), ref64, eager, name=backend)
        assert counted(fused) == (3 * 2 * 7, {})


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_to_a_gpu_and_back(kind: str) -> None:
    stock = peft_model(kind, compute_dtype=torch.float32)
    fused = accelerated_copy(stock)
    x = torch.randn(9, K)
    on_cpu, exact = fused(x), float64_copy(stock)(x.double())
    on_gpu = fused.to("cuda")(x.to("cuda"))
    assert on_gpu.is_cuda
    assert_accurate(on_gpu, exact, stock(x), name="y")
    assert_same_bits(fused.to("cpu")(x), on_cpu, name="y")
    assert counted(fused) == (3, {})
