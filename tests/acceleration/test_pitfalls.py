"""Each warning has a model that provokes it and one that does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_families import EXPERTS_ARE_PARAMETERS, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_fast
from lora_fast.acceleration import pitfalls as module
from lora_fast.acceleration.pitfalls import pitfalls
from lora_fast.acceleration.report import adapted_layers
from lora_fast.features import EXPERTS_OF_PEFT


def adapted(family: str, **options: Any) -> Any:
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], **options}
    return lora_fast.accelerate(get_peft_model(tiny_model(family), LoraConfig(**options)))


def llama(**options: Any) -> Any:
    return adapted("llama", **options)


def moe(**options: Any) -> Any:
    return adapted("qwen3_moe", **options)


def hooked() -> Any:
    model = llama()
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    layer.lora_A["default"].register_forward_hook(lambda *args: None)
    return model


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 4), nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[0](x) * self.gate(x).sum()


def routed(*targets: str) -> Any:
    config = LoraConfig(r=2, target_modules=list(targets))
    return lora_fast.accelerate(get_peft_model(nn.Sequential(Router()), config))


def quantised() -> Any:
    model = lora_fast.quantize_experts(tiny_model("qwen3_moe").bfloat16())
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


BF16 = {"autocast": torch.bfloat16}
NEEDS_EXPERTS = pytest.mark.skipif(
    not EXPERTS_ARE_PARAMETERS, reason="experts are a list of modules"
)
# name: what the line says, how the model is made that provokes it and that does not, options
CASES: dict[str, tuple[str, Callable[[], Any], Callable[[], Any], dict[str, Any]]] = {
    "output layer": (
        "lm_head: a fused loss (Liger, Cut Cross-Entropy) multiplies with its weight alone",
        lambda: llama(target_modules=["q_proj", "lm_head"]),
        llama,
        {},
    ),
    "wide adapters": (
        "parameters in float32 under bfloat16 autocast",
        llama,
        lambda: llama().bfloat16(),
        BF16,
    ),
    "linear attention": (
        "DeltaNet: without fla and causal_conv1d the recurrence runs step by step",
        lambda: adapted("qwen3_next", target_modules=["out_proj"]),
        llama,
        {},
    ),
    "dropout": (
        "lora_dropout = 0.1 is applied here",
        lambda: llama(lora_dropout=0.1),
        llama,
        {},
    ),
    "lost target": (
        "target_modules of default: c_attn match no layer of the model",
        lambda: llama(target_modules=["q_proj", "c_attn"]),
        llama,
        {},
    ),
    "router": (
        "0.gate: an adapter on a router changes which experts are chosen or how much they count, "
        'and what was balanced; PEFT\'s target_modules="all-linear" puts one there: to leave it '
        "out, write target_modules=['0']",
        lambda: routed("gate", "experts.0"),
        lambda: routed("experts.0"),
        {},
    ),
    "bypassed": (
        "layers.0.mixer.x_proj and 1 more: MambaMixer uses its weight instead of calling it",
        lambda: adapted("mamba", target_modules=["x_proj"]),
        llama,
        {},
    ),
    "fallback": (
        "PEFT's own forward runs, hooks on lora_A; to fuse: remove the hooks while training",
        hooked,
        llama,
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_is_said_where_it_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words, provoking, innocent, options = CASES[name]
    monkeypatch.setattr(module, "find_spec", lambda package: None)
    said = pitfalls(provoking(), **options)
    assert sum(words in line for line in said) == 1, said
    assert pitfalls(innocent(), **options) == ()


@NEEDS_EXPERTS
def test_experts_are_adapted_or_quantised_or_named() -> None:
    (line,) = pitfalls(moe())
    assert "in 2 modules are neither adapted (target_parameters) nor quantised" in line
    if not EXPERTS_OF_PEFT.is_on():
        return  # whatever adapts experts falls back, which is another line
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert not any("experts" in line for line in pitfalls(moe(target_parameters=both)))
    assert not any("experts" in line for line in pitfalls(quantised()))


@NEEDS_EXPERTS
def test_layers_whose_names_went_to_experts_are_named() -> None:
    """PEFT adapts the experts' parameters instead of the shared expert's three layers."""
    if not EXPERTS_OF_PEFT.is_on():
        return
    said = pitfalls(adapted("qwen3_next", target_modules="all-linear"))
    (line,) = [line for line in said if "had their names" in line]
    assert line.startswith("model.layers.0.mlp.shared_expert.gate_proj and 5 more: no adapter")
    assert "layers called down_proj, gate_proj, up_proj" in line
    model = adapted("qwen3_next", target_modules="all-linear")
    assert "no adapter on 6 linear layers that have their names" in str(lora_fast.report(model))
    by_name = {"target_parameters": ["experts.down_proj"], "target_modules": ["q_proj"]}
    assert not any("had their names" in line for line in pitfalls(adapted("qwen3_next", **by_name)))


def test_nothing_is_said_of_a_loss_that_is_not_fused() -> None:
    model = llama(target_modules=["q_proj", "lm_head"])
    assert pitfalls(model, fused_loss=False) == ()
    assert "the fused loss" in pitfalls(model, fused_loss=True)[0]
    before = copy.deepcopy(model.state_dict())
    pitfalls(model)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "mixtral"])
def test_what_is_to_be_written_instead_of_all_linear_adapts_all_but_the_router(family: str) -> None:
    """Which routers "all-linear" adapts depends on PEFT; shared_expert_gate is a linear layer."""
    model = adapted(family, target_modules="all-linear")
    names = {name for name, _ in adapted_layers(model)}
    routers = {
        n
        for n in names
        if n.endswith((".mlp.gate", ".block_sparse_moe.gate", ".shared_expert_gate"))
    }
    assert routers or family != "qwen2_moe"
    said = [line for line in pitfalls(model) if "router" in line]
    assert len(said) == bool(routers)
    if routers:
        written = said[0].partition("to leave it out, write ")[2]
        other = adapted(family, **eval(f"dict({written})"))
        assert {name for name, _ in adapted_layers(other)} == names - routers
