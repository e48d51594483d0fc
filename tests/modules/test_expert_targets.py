"""What convert says of experts that are parameters."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from model_families import EXPERTS_ARE_PARAMETERS, tiny_model

import lora_fast

pytestmark = pytest.mark.skipif(not EXPERTS_ARE_PARAMETERS, reason="experts are modules")


@pytest.mark.parametrize(
    "targets", [["experts"], ["down_proj"], ["experts.gate_up_proj"], r".*\.experts(\..*)?"]
)
def test_experts_alone_are_refused(targets: Any) -> None:
    model = tiny_model("qwen3_moe")
    before = dict(model.named_modules())
    message = r"target_modules must name linear layers, got 'model\.layers\.0\.mlp\.experts.*"
    with pytest.raises(ValueError, match=message + "target_parameters and lora_fast.accelerate"):
        lora_fast.convert(model, targets)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("targets", ["all-linear", ["o_proj", "down_proj"]])
def test_experts_beside_layers_are_warned_of(targets: Any) -> None:
    # The first layer of DeepSeek-V3 is dense: it has a down_proj that is a layer.
    model = tiny_model("deepseek_v3")
    with pytest.warns(UserWarning, match="experts gets no adapter: experts are parameters"):
        lora_fast.convert(model, targets)


def test_experts_that_stay_dense_in_a_quantised_model() -> None:
    with pytest.warns(UserWarning, match="experts stays as it is: quantise experts with"):
        lora_fast.convert(tiny_model("qwen3_moe"), ["q_proj"], quantize="nf4")
    model = lora_fast.quantize_experts(tiny_model("qwen3_moe"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_fast.convert(model, ["q_proj"], quantize="nf4")


def test_layers_of_a_mixture_are_no_reason_to_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_fast.convert(tiny_model("qwen3_moe"), ["q_proj"])
