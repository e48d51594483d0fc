"""Adapters of experts merged file by file: what PEFT's merge gives, however the base is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import FUSES, adapted, expert_base, expert_parameters
from lora_models import quietly
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lora_fast
from lora_fast.export import merge_checkpoint

pytestmark = pytest.mark.skipif(not FUSES, reason="needs PEFT 0.19.1 and transformers' flags")


def _stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


# One tensor an expert, with gate and up apart or without a gate; one tensor of all, transposed.
@pytest.mark.parametrize(
    ("family", "parts"), [("qwen3_moe", 12), ("nemotron_h", 8), ("gpt_oss", 2), ("mixtral", 12)]
)
def test_equal_to_peft_in_float64(family: str, parts: int, tmp_path: Path) -> None:
    base = expert_base(family).double()
    base.save_pretrained(tmp_path / "base")
    routers = ["gate.weight"] if family == "qwen3_moe" else []
    model = adapted(base, [*expert_parameters(base), *routers])
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    expected = quietly(model.merge_and_unload).state_dict()
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[key], msg=key)
    before, after = _stored(tmp_path / "base"), _stored(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = [key for key, value in before.items() if not torch.equal(value, after[key])]
    layers = sum(hasattr(module, "has_gate") for module in base.modules())
    assert len([key for key in changed if ".experts." in key]) == layers * parts


def test_a_base_with_experts_in_four_bits(tmp_path: Path) -> None:
    """Under the keys of bitsandbytes' parametrization: decoded, and written in 16 or 32 bits."""
    base = expert_base("gpt_oss")
    base.save_pretrained(tmp_path / "base")
    lora_fast.quantize_experts(base)
    state = {k: v.contiguous() for k, v in base.state_dict().items()}
    model = adapted(base, ["experts.gate_up_proj", "experts.down_proj"])
    model.save_pretrained(tmp_path / "adapter")
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    merge_checkpoint(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    after = _stored(tmp_path / "out")
    for wrapper in (m for m in model.modules() if hasattr(m, "parameter_name")):
        module = wrapper.get_base_layer()
        path = next(n for n, m in model.named_modules() if m is module)
        key = f"{path.removeprefix('base_model.model.').replace('.base_layer', '')}"
        key = f"{key}.{wrapper.parameter_name}"
        expected = getattr(module, wrapper.parameter_name) + wrapper.get_delta_weight("default")
        torch.testing.assert_close(after[key], expected.detach(), msg=key)
