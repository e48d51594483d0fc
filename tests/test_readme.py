"""The README's code runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def tiny_llama() -> nn.Module:
    """Stands in for the reader's ``base_model``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def run_block(having: str) -> dict[str, Any]:
    """Execute the one block that contains ``having``; return its names."""
    (block,) = (block for block in BLOCKS if having in block)
    names: dict[str, Any] = {"base_model": tiny_llama()}
    exec(compile(block, "README.md", "exec"), names)
    return names


def fused_calls_of_a_step(model: nn.Module) -> int:
    import lora_fast

    tokens = torch.arange(8).reshape(1, 8)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert lora_fast.report(model).all_fused
    return lora_fast.report(model).fused_calls


@pytest.mark.parametrize("having", ["lora_fast.accelerate(", "lora_fast.convert("])
def test_model_blocks_leave_a_model_that_trains_fused(having: str) -> None:
    model = run_block(having)["model"]
    assert fused_calls_of_a_step(model) == 14, "seven linears in two layers"


def test_operation_block_gives_gradients() -> None:
    names = run_block("functional.adapted_linear")
    assert names["y"].shape == (8, 32)
    assert names["A"].grad is not None
    assert names["B"].grad.abs().sum() > 0


def test_every_block_is_tested() -> None:
    assert len(BLOCKS) == 3


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (Path(__file__).resolve().parent.parent / "Makefile").read_text()
    targets = set(re.findall(r"^    make (\w+)|`make (\w+)`", README, re.MULTILINE))
    names = {name for pair in targets for name in pair if name}
    assert {"train", "test", "gpu"} <= names
    for name in names:
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name
