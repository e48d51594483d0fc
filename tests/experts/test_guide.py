"""The guide's recipes for mixtures of experts, as printed."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import safetensors.torch
import torch
import transformers
import trl
from datasets import Dataset
from expert_models import FUSES, expert_base
from model_families import VOCABULARY
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models

import lora_fast

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide.md"
USED = ("AutoModelForCausalLM", "BitsAndBytesConfig", "Trainer")
MARKED = r"^<!-- run by tests/experts/test_guide.py -->\n```py\n(.*?)^```$"
pytestmark = [
    pytest.mark.skipif(not FUSES, reason="needs PEFT 0.19.1 and transformers' flags"),
    pytest.mark.skipif(
        trl.__version__.startswith("1.15.") and not torch.cuda.is_available(),
        reason="TRL 1.15 computes its loss by Triton wherever that is installed",
    ),
]


def test_recipes_run_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # bitsandbytes' own layers take no rows shorter than a block on every CPU.
    base = expert_base("qwen3_moe", hidden_size=64, num_attention_heads=4, head_dim=16)
    base.to(torch.bfloat16).save_pretrained(tmp_path / "mixture")
    letters = {chr(ord("A") + number): number for number in range(VOCABULARY - 3)}
    rows = {"input_ids": [[1, 2, 3]] * 8, "labels": [[1, 2, 3]] * 8}
    names: dict[str, Any] = {
        **{name: getattr(transformers, name) for name in USED},
        "torch": torch,
        "safetensors": safetensors,
        "accelerate": accelerate,
        "lora_fast": lora_fast,
        "get_peft_model": get_peft_model,
        "SFTTrainer": trl.SFTTrainer,
        "sft_arguments": trl.SFTConfig(
            "sft", max_steps=2, save_strategy="no", report_to="none", bf16=False
        ),
        "name": str(tmp_path / "mixture"),
        "config": LoraConfig(
            r=8,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            task_type="CAUSAL_LM",
        ),
        "batch": Dataset.from_dict(rows),
        "tokenizer": transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE(letters, [])), pad_token="A", eos_token="B"
        ),
        "arguments": transformers.TrainingArguments(
            "run", max_steps=2, save_strategy="no", report_to="none"
        ),
    }
    recipes = re.findall(MARKED, GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(recipes) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for recipe in recipes[:2]:
            exec(compile(recipe, "guide", "exec"), names)
        report = lora_fast.report(names["trainer"].model)
        assert report.all_fused and report.fused_calls > 0
        assert "nf4" in {line.base for line in report.layers if "experts" in line.name}
        before = names["trainer"].model.get_base_model()
        exec(compile(recipes[2], "guide", "exec"), names)
    assert not any(p.is_meta for p in names["model"].parameters())
    assert before is not names["model"]
