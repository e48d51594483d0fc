"""What the report and the doctor say of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from expert_models import FUSES, adapted, expert_base
from model_families import tiny_model
from tiny_runs import run_cli

import lora_fast
from lora_fast.acceleration.expert_summary import about_experts

pytestmark = pytest.mark.skipif(not FUSES, reason="needs PEFT 0.19.1 and transformers' flags")


def test_which_train_and_which_are_quantised() -> None:
    base = lora_fast.quantize_experts(expert_base("qwen3_moe"))
    both: Any = lora_fast.accelerate(adapted(base, ["experts.gate_up_proj", "experts.down_proj"]))
    line = "experts in 2 modules: LoRA trains down_proj in 2, gate_up_proj in 2; 2 in 4 bits"
    assert lora_fast.report(both).experts == line
    assert line in str(lora_fast.report(both))
    for parameter in both.parameters():
        parameter.requires_grad_(False)
    assert "no adapter trains on them; 2 in 4 bits" in str(about_experts(both))
    one = adapted(expert_base("qwen3_moe"), ["0.mlp.experts.down_proj"])
    assert about_experts(one) == (
        "experts in 2 modules: LoRA trains down_proj in 1; none in 4 bits; "
        "1 neither adapted nor quantised"
    )
    assert about_experts(tiny_model("llama")) is None


def test_the_doctor_says_it_of_a_model_that_is_not_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expert_base("gpt_oss").config.save_pretrained(tmp_path)
    assert run_cli("doctor", "--model", tmp_path, "--no-kernels") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no adapter trains on them; all in 4 bits as lora-fast train loads them" in shown
    assert "neither adapted" not in shown
    assert run_cli("doctor", "--model", tmp_path, "--no-kernels", "--quantize", "none") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "none in 4 bits; 2 neither adapted nor quantised" in shown
