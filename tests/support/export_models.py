"""Base models on disk with adapters as `lora-fast train` would write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from lora_fast.methods.base_model import Base
from lora_fast.methods.table import METHODS
from lora_fast.training.config import TrainConfig


def load(folder: Path, dtype: torch.dtype = torch.float32, task: str = "causal-lm") -> Any:
    kind = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    return kind.from_pretrained(folder, dtype=dtype)


def adapted(
    folder: Path,
    method: str,
    dtype: torch.dtype,
    task: str = "causal-lm",
    targets: str | None = None,
) -> Any:
    """The model that `lora-fast train` trains, every trained number disturbed as training would."""
    base = load(folder, dtype, task)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options: dict[str, Any] = {"r": 4} if "r" in METHODS[method].options else {}
    if targets is not None and "target_modules" in METHODS[method].options:
        options["target_modules"] = targets
    if method == "fourierft":
        options["frequencies"] = 50
    run = TrainConfig(model=str(folder), data="-", task=task, method=method, quantize="none",
                      steps=10, **options).with_defaults(0)  # fmt: skip
    held = Base(str(folder), base, tokenizer, dtype, torch.device("cpu"))
    model = METHODS[method].build(held, run, 10)
    disturb(model)
    if method == "adalora":
        cut_ranks(model)
    return model


def disturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad or "lora_A" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))


def cut_ranks(model: Any) -> None:
    """Let the allocator have dropped directions, of one layer all, as at the end of training."""
    config = model.peft_config["default"]
    pattern = {}
    for index, (name, layer) in enumerate(
        (n, m) for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_E")
    ):
        rank = config.init_r
        kept = [index != 1 and i % 2 == 0 for i in range(rank)]
        layer.lora_E["default"].data[[not k for k in kept]] = 0.0
        pattern[f"{name}.lora_E"] = kept
    config.rank_pattern = pattern
