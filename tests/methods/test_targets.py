"""What "all-linear" means: every linear layer but those where an adapter does harm or nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import FUSES
from model_families import EXPERTS_ARE_PARAMETERS, inputs, tiny_model
from peft import PeftModel

from lora_fast.acceleration.report import adapted_layers
from lora_fast.errors import TrainingError
from lora_fast.experts.routers import is_router
from lora_fast.methods.base_model import Base
from lora_fast.methods.options import MethodOptions
from lora_fast.methods.table import METHODS, completed
from lora_fast.methods.targets import about_left_out

pytestmark = pytest.mark.skipif(not EXPERTS_ARE_PARAMETERS, reason="experts are a list of modules")
names_experts = pytest.mark.skipif(not FUSES, reason="this PEFT knows no names of experts")
# Routers as linear layers, as parameters, and both.
FAMILIES = ("qwen2_moe", "qwen3_moe", "qwen3_next", "glm4_moe", "mixtral", "gpt_oss")


def trained(family: str, method: str = "lora", **options: Any) -> Any:
    """What ``lora-fast train --method`` makes of a tiny model of the family."""
    options = {"task": "causal-lm", "experts": False, "quantize": "none", **options}
    model = tiny_model(family)
    base = Base(family, model, None, torch.float32, torch.device("cpu"))
    chosen = completed(MethodOptions(method=method, **options), 1000)
    return METHODS[method].build(base, chosen, 10)


def layers_of(model: Any) -> dict[str, Any]:
    return {n.removeprefix("base_model.model."): layer for n, layer in adapted_layers(model)}


@pytest.mark.parametrize("method", ["lora", "vera", "adalora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_router_is_adapted_and_it_is_said(family: str, method: str) -> None:
    model = trained(family, method)
    modules = dict(model.named_modules())
    found = [name for name, _ in adapted_layers(model)]
    assert found
    assert [name for name in found if is_router(name, modules)] == []
    lines = [line for line in about_left_out(model) if "router" in line]
    assert len(lines) == 1 and "experts are chosen" in lines[0]


def test_names_that_are_given_are_adapted_routers_or_not() -> None:
    model = trained("qwen2_moe", target_modules="q_proj,shared_expert_gate")
    assert {n.rpartition(".")[2] for n in layers_of(model)} == {"q_proj", "shared_expert_gate"}


def test_the_adapter_without_routers_loads_in_stock_peft(tmp_path: Path) -> None:
    model = trained("qwen3_moe", experts=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("qwen3_moe"), tmp_path)
    assert layers_of(loaded).keys() == layers_of(model).keys()
    assert torch.equal(loaded(**inputs()).logits, model.eval()(**inputs()).logits)


@names_experts
@pytest.mark.parametrize(("method", "options"), [("dora", {}), ("lora", {"dropout": 0.1})])
def test_what_peft_refuses_on_experts_says_what_to_train_instead(
    method: str, options: dict[str, Any]
) -> None:
    with pytest.raises(TrainingError, match="cannot adapt qwen3_moe") as caught:
        trained("qwen3_moe", method, **options)
    names = re.findall(r"--target-modules (\S+),", str(caught.value))
    assert names == ["q_proj,k_proj,v_proj,o_proj"]
    model = trained("qwen3_moe", method, **options, target_modules=names[0])
    assert {n.rpartition(".")[2] for n in layers_of(model)} == set(names[0].split(","))


@names_experts
@pytest.mark.parametrize("family", ["qwen3_next", "glm4_moe"])
def test_layers_that_lost_their_names_to_experts_are_named(family: str) -> None:
    model = trained(family)
    linear = {
        n.removeprefix("base_model.model.")
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "lora_" not in n and ".base_layer" not in n
    }
    left = {n for n in linear if re.search(r"(gate|up|down)_proj$", n)}
    assert left, "PEFT adapts them now: the line can go"
    (line,) = [line for line in about_left_out(model) if "PEFT adapts parameters" in line]
    assert line.startswith(tuple(left)) and f"and {len(left) - 1} more" in line
