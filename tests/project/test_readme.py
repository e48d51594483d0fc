"""The README's code runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tiny_runs import tiny_llama
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


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


def test_accelerated_model_trains_fused() -> None:
    model = run_block("lora_fast.accelerate(")["model"]
    assert fused_calls_of_a_step(model) == 14, "seven linears in two layers"


def test_every_block_is_tested() -> None:
    assert len(BLOCKS) == 1


def test_expressions_in_the_text_are_calls_that_exist() -> None:
    import lora_fast

    lora_fast.convert(tiny_llama(), "all-linear", quantize="nf4")
    assert 'lora_fast.convert(model, "all-linear", quantize="nf4")' in README
    assert isinstance(eval("lora_fast.LoraFastCallback()"), lora_fast.LoraFastCallback)
    assert "callbacks=[lora_fast.LoraFastCallback()]" in README


def test_it_fits_on_a_screen() -> None:
    assert len(README.splitlines()) < 100


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^    make (\w+)|`make (\w+)`", README, re.MULTILINE))
    names = {name for pair in targets for name in pair if name}
    assert {"train", "test", "gpu"} <= names
    for name in names:
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name


def test_versions_are_the_lower_bounds_of_pyproject() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for package in ("torch", "triton", "peft", "transformers", "bitsandbytes", "trl"):
        # The first is that of the library; the command line asks for more.
        bound = re.findall(rf'"{package}>=([\d.]+)', project)[0]
        assert re.search(rf"\b{package} ≥ {re.escape(bound)}(?!\.?\d)", README, re.IGNORECASE), (
            package
        )
    assert "compute capability 8.0 or more" in README
