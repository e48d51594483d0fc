"""Layers that PEFT wraps after accelerate, for an adapter that is added or loaded later."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_models import (
    K,
    Mlp,
    accelerated_copy,
    compare,
    counted,
    lora_config,
    lora_layers,
    peft_model,
)
from peft import AdaLoraConfig, IA3Config, VeraConfig, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn

import lora_fast
from lora_fast import peft_layers


class SameWidth(nn.Sequential):
    """Two layers one after the other, under any names."""

    def __init__(self, first: str = "fc1", second: str = "fc2") -> None:
        super().__init__(OrderedDict({first: nn.Linear(K, K), second: nn.Linear(K, K)}))


class SameInput(SameWidth):
    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.k_proj(x)


def _added(model: Any, path: Path) -> None:
    model.add_adapter("wide", lora_config())


def _loaded(model: Any, path: Path) -> None:
    peft_model(model=Mlp()).save_pretrained(path)
    model.load_adapter(path, "wide")


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("change", [_added, _loaded])
def test_layers_wrapped_later_are_covered(
    change: Callable[[Any, Path], None], copied: bool, tmp_path: Path
) -> None:
    """An adapter that is added or loaded later may adapt layers that none did before."""
    stock = peft_model(model=Mlp(), target_modules=["fc1"])
    fused = accelerated_copy(stock)
    if copied:
        fused = pickle.loads(pickle.dumps(copy.deepcopy(fused)))
    for model in (stock, fused):
        torch.manual_seed(7)
        change(model, tmp_path)
        model.set_adapter("wide")
    compare(fused, stock, torch.randn(3, K), compute_dtype=torch.float32)
    assert counted(fused) == (2, {})
    lora_fast.decelerate(fused)
    assert type(fused.base_model) is lora.LoraModel
    fused.add_adapter("later", lora_config())
    assert {type(layer) for layer in lora_layers(fused)} == {lora.Linear}


@pytest.mark.parametrize(
    ("config", "wider"),
    [
        (VeraConfig(r=4, target_modules=["fc1"]), VeraConfig(r=4, target_modules=["fc1", "fc2"])),
        (
            IA3Config(target_modules=["fc1"], feedforward_modules=[]),
            IA3Config(target_modules=["fc1", "fc2"], feedforward_modules=["fc2"]),
        ),
        (
            AdaLoraConfig(target_modules=["fc1"], total_step=9),
            AdaLoraConfig(target_modules=["fc1", "fc2"], total_step=9, inference_mode=True),
        ),
    ],
    ids=["vera", "ia3", "adalora"],
)
def test_every_tuner_covers_its_later_layers(config: Any, wider: Any) -> None:
    model = get_peft_model(SameWidth(), config)
    name = model.get_model_status().adapter_model_type
    lora_fast.accelerate(model)
    assert model.get_model_status().adapter_model_type == name
    model.add_adapter("wide", wider)
    model.set_adapter("wide")
    model(torch.randn(3, K))
    assert counted(model) == (2, {})


def test_mixed_models_cover_their_later_layers() -> None:
    """PeftMixedModel has a tuner of its own, and layers of several methods."""
    config = lora_config(target_modules=["fc1"])
    model = lora_fast.accelerate(get_peft_model(SameWidth(), config, mixed=True))
    model.add_adapter("svd", AdaLoraConfig(target_modules=["fc2"], total_step=9))
    model.set_adapter(["default", "svd"])
    model(torch.randn(3, K))
    assert counted(model) == (2, {})


@pytest.mark.parametrize("grouped", [True, False])
def test_later_layers_are_grouped_as_asked(grouped: bool) -> None:
    stock = peft_model(model=SameInput("q_proj", "k_proj"), target_modules=["q_proj"])
    model = lora_fast.accelerate(stock, group_shared_inputs=grouped)
    model.add_adapter("wide", lora_config(target_modules=["q_proj", "k_proj"]))
    inner = model.base_model.model
    assert {peft_layers.shared_input.GROUP in vars(layer) for layer in lora_layers(inner)} == {
        grouped
    }
