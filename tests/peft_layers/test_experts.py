"""Mixtures of experts, whose weights are parameters, not layers: they fall back to PEFT and say
so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from model_families import EXPERTS_ARE_PARAMETERS, inputs, tiny_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_fast
from bench.instruments.accuracy import assert_models_agree

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def _adapted(family: str) -> Any:
    config = LoraConfig(
        r=2, target_modules=["q_proj", "k_proj", "v_proj"], target_parameters=EXPERTS,
        init_lora_weights=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(tiny_model(family), config).eval()


def _run(model: nn.Module) -> dict[str, Tensor | None]:
    output = model(**inputs())
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": output.logits.detach(), **gradients}


@pytest.mark.parametrize(
    "family", ["gpt_oss", *(["qwen3_moe", "mixtral"] if EXPERTS_ARE_PARAMETERS else [])]
)
def test_experts_train_as_stock_and_the_report_says_that_they_are_not_fused(family: str) -> None:
    stock, fused = _adapted(family), lora_fast.accelerate(_adapted(family))
    actual = _run(fused)
    assert_models_agree(actual, _run(stock))
    assert all(grad is not None for name, grad in actual.items() if ".experts." in name)
    report = lora_fast.report(fused)
    experts = [line for line in report.layers if ".experts" in line.name]
    assert len(experts) == 2 * len(EXPERTS)  # of two blocks
    for line in experts:
        assert (line.fused, line.counted) == (False, False)
        assert line.obstacle == "lora.ParamWrapper has no fused path"
        assert line.base == "float32"
    assert report.fused_calls == len(report.layers) - len(experts)
    assert not report.all_fused
