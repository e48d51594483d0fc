"""PEFT's wrappers around experts: as stock, whatever the family, and where they are not fused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from expert_models import (
    FUSES,
    OTHERS,
    TYPICAL,
    R,
    adapted,
    expert_base,
    expert_parameters,
    pair,
    results,
    wrappers,
)
from lora_models import quietly
from model_families import EXPERTS_ARE_PARAMETERS, inputs
from torch import Tensor, nn

import lora_fast
from bench.instruments.accuracy import assert_models_agree, assert_same_bits

needs_fused = pytest.mark.skipif(not FUSES, reason="needs PEFT 0.19.1 and transformers' flags")
parameters = pytest.mark.skipif(not EXPERTS_ARE_PARAMETERS, reason="experts are modules")


@needs_fused
@pytest.mark.parametrize(
    "family",
    [*TYPICAL, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in OTHERS)],
)
def test_families_train_as_stock(family: str) -> None:
    stock, fused = pair(family)
    assert_models_agree(results(fused), results(stock))
    report = lora_fast.report(fused)
    assert report.all_fused
    assert report.fused_calls == len(wrappers(fused)) == len(report.layers)
    assert {line.base for line in report.layers} == {"float32"}


@needs_fused
@pytest.mark.exhaustive
@pytest.mark.parametrize("family", [*TYPICAL, *OTHERS])
def test_one_token_and_experts_without_rows(family: str) -> None:
    stock, fused = pair(family)
    found, expected = (results(m, samples=1, tokens=2) for m in (fused, stock))
    assert_models_agree(found, expected)
    idle = [g for n, g in found.items() if "lora_A" in n and g is not None and _has_idle(g)]
    assert idle, "every expert has rows"
    with torch.no_grad():
        one = {key: value[:1, :1] for key, value in inputs().items()}
        assert_models_agree({"logits": fused(**one).logits}, {"logits": stock(**one).logits})
    assert lora_fast.report(fused).all_fused


def _has_idle(gradient: Tensor) -> bool:
    """Whether lora_A [E · r, K] of some expert has no gradient."""
    return not gradient.view(-1, R, gradient.shape[1]).flatten(1).any(1).all()


@parameters
@pytest.mark.skipif(FUSES, reason="the fused path runs")
def test_older_packages_run_peft_and_say_why() -> None:
    stock, fused = pair("qwen3_moe")
    assert_models_agree(results(fused), results(stock))
    report = lora_fast.report(fused)
    assert not report.all_fused and not report.fused_calls
    assert sum(report.fallback_calls.values()) == len(report.layers)


@needs_fused
@pytest.mark.parametrize(
    "implementation", ["grouped_mm", pytest.param("batched_mm", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_implementations_are_replaced(family: str, implementation: str) -> None:
    stock, fused = pair(family, implementation=implementation)
    assert_models_agree(results(fused), results(stock))
    assert lora_fast.report(fused).all_fused


@needs_fused
@pytest.mark.parametrize("k", [1, 4])
def test_one_token_by_one_expert_or_all(k: int) -> None:
    stock, fused = pair("mixtral", num_experts_per_tok=k)
    assert_models_agree(results(fused, samples=1, tokens=2), results(stock, samples=1, tokens=2))
    with torch.no_grad():
        one = {key: value[:, :1] for key, value in inputs().items()}
        assert_models_agree({"logits": fused(**one).logits}, {"logits": stock(**one).logits})
    assert lora_fast.report(fused).all_fused


@needs_fused
@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj"])
def test_one_adapted_projection(target: str) -> None:
    stock = adapted(expert_base("gpt_oss"), [f"experts.{target}"])
    fused = lora_fast.accelerate(copy.deepcopy(stock))
    assert_models_agree(results(fused), results(stock))
    assert lora_fast.report(fused).all_fused


@needs_fused
def test_biases_and_routers_train() -> None:
    """Biases of experts and routers, beside the adapters."""
    stock = adapted(expert_base("gpt_oss"))
    for name, parameter in stock.named_parameters():
        if ".router." in name or name.endswith("_proj_bias"):
            parameter.requires_grad_()
    fused = lora_fast.accelerate(copy.deepcopy(stock))
    found = results(fused)
    assert any("gate_up_proj_bias" in key for key in found)
    assert_models_agree(found, results(stock))
    assert lora_fast.report(fused).all_fused


@needs_fused
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    stock, fused = pair("qwen3_moe")
    expected = results(stock)
    fused.enable_input_require_grads()
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_models_agree(results(fused), expected)
    # The other kind stops a recomputed pass once it has what it needs.
    passes = 2 if reentrant else 1
    assert lora_fast.report(fused).fused_calls == passes * len(wrappers(fused))


@needs_fused
def test_several_adapters_at_once() -> None:
    stock = adapted(expert_base("qwen3_moe"))
    config = copy.deepcopy(stock.peft_config["default"])
    config.r, config.lora_alpha = 2, 7
    stock.add_adapter("second", config)
    stock.base_model.set_adapter(["default", "second"])
    fused = lora_fast.accelerate(copy.deepcopy(stock))
    assert_models_agree(results(fused), results(stock))
    assert lora_fast.report(fused).all_fused


@needs_fused
def test_several_bfloat16_adapters_under_autocast_of_float16() -> None:
    """Autocast joins no tensors of a 16-bit dtype that is not its own."""
    stock = adapted(expert_base("qwen3_moe"))
    stock.add_adapter("second", copy.deepcopy(stock.peft_config["default"]))
    stock.base_model.set_adapter(["default", "second"])
    stock.bfloat16()
    fused, exact = lora_fast.accelerate(copy.deepcopy(stock)), copy.deepcopy(stock).float()
    with torch.no_grad():
        expected = exact(**inputs()).logits
        with torch.autocast("cpu", torch.float16):
            actual, eager = fused(**inputs()).logits, stock(**inputs()).logits
    assert lora_fast.report(fused).fused_calls == len(wrappers(fused))
    assert (actual - expected).norm() <= 2 * (eager - expected).norm()


@needs_fused
def test_a_scaling_that_is_not_finite_is_left_to_peft() -> None:
    _, fused = pair("qwen3_moe")
    wrappers(fused)[0].scaling["default"] = float("nan")
    fused(**inputs())
    assert lora_fast.report(fused).fallback_calls["scaling is not finite"] > 0


@needs_fused
def test_an_adapter_is_added_to_fused_experts() -> None:
    """PEFT looks for its wrappers by the name of their class."""
    stock = adapted(expert_base("qwen3_moe"))
    fused = lora_fast.accelerate(copy.deepcopy(stock))
    config = copy.deepcopy(stock.peft_config["default"])
    for model in (stock, fused):
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    fused.load_state_dict(stock.state_dict())
    assert_models_agree(results(fused), results(stock))
    assert lora_fast.report(fused).all_fused
    assert_models_agree(results(pickle.loads(pickle.dumps(fused))), results(stock))


@needs_fused
def test_merged_and_disabled_fall_back() -> None:
    stock, fused = pair("gpt_oss")
    before = results(fused)
    calls = lora_fast.report(fused).fused_calls
    for model in (stock, fused):
        quietly(model.merge_adapter)
    with torch.no_grad():
        logits = fused(**inputs()).logits
        assert_same_bits(logits, stock(**inputs()).logits, name="merged")
        assert_models_agree({"logits": logits}, {"logits": before["logits"]})
    for model in (stock, fused):
        quietly(model.unmerge_adapter)
    assert_models_agree(results(fused), before)
    with torch.no_grad(), stock.disable_adapter(), fused.disable_adapter():
        assert_same_bits(fused(**inputs()).logits, stock(**inputs()).logits, name="disabled")
    report = lora_fast.report(fused)
    assert report.fallback_calls == {"merged": 4, "adapters disabled": 4}
    assert report.fused_calls == 2 * calls


@needs_fused
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_backward_pass_after_a_merge_raises(family: str) -> None:
    """Stock, which has formed W + s B A before, has its gradients; never those of the merged W."""
    stock, fused = pair(family)
    loss = fused(**inputs()).loss
    fused.merge_adapter()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    fused.unmerge_adapter()
    assert_models_agree(results(fused), results(stock))


@needs_fused
def test_copies_pickles_and_the_way_back() -> None:
    stock, fused = pair("qwen3_moe")
    expected = results(fused)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_models_agree(results(again), expected)
        assert lora_fast.report(again).all_fused
    assert str(fused) == str(stock)
    assert list(fused.state_dict()) == list(stock.state_dict())
    lora_fast.decelerate(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]
    assert_models_agree(results(fused), results(stock))


@needs_fused
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_autocast(implementation: str) -> None:
    """In the dtype in which stock computes, and no further from float32 than twice stock."""
    stock, fused = pair("qwen3_moe", implementation=implementation)
    exact = results(stock)

    def run(model: nn.Module) -> dict[str, Any]:
        with torch.autocast("cpu", torch.bfloat16):
            return results(model)

    actual, plain = run(fused), run(stock)
    assert lora_fast.report(fused).all_fused
    for key, expected in exact.items():
        if key == "loss":  # one number, whose error may be 0 by luck
            continue
        got, eager = actual[key], plain[key]
        assert got is not None and eager is not None and expected is not None
        assert got.dtype == eager.dtype
        assert (got - expected).norm() <= 2 * (eager - expected).norm() + 1e-7 * expected.norm()


def _no_decoration(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "has_gate"):
            forward = type(module).forward.__wrapped__
            module.__class__ = type("Own", (type(module),), {"forward": forward})


def _hook(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "has_gate"):
            module.register_forward_hook(lambda *_: None)


def _hook_on_inner(model: Any) -> None:
    for wrapper in wrappers(model):
        if hasattr(wrapper.base_layer, "parameter_name"):
            wrapper.base_layer.register_forward_hook(lambda *_: None)


def _set(name: str, value: Any) -> Any:
    def change(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "has_gate"):
                setattr(module, name, value)

    return change


def _train_experts(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "has_gate"):
            module.down_proj.requires_grad_()


OBSTACLES = {
    "Own is not decorated as transformers decorates experts": _no_decoration,
    "hooks on experts module": _hook,
    "hooks on inner wrapper": _hook_on_inner,
    "expert parallelism": _set("_is_expert_parallel", True),
    "experts' weights train": _train_experts,
}


@needs_fused
@pytest.mark.parametrize("reason", OBSTACLES)
def test_obstacles_run_peft_and_are_reported(reason: str) -> None:
    stock, fused = pair("qwen3_moe")
    for model in (stock, fused):
        OBSTACLES[reason](model)
    assert_models_agree(results(fused), results(stock))
    report = lora_fast.report(fused)
    assert {line.obstacle for line in report.layers} == {reason}
    assert report.fused_calls == 0 and not report.all_fused
    assert report.fallback_calls[reason] >= 2
    assert sum(report.fallback_calls.values()) == 4


@needs_fused
@pytest.mark.parametrize("implementation", ["deepgemm", "sonicmoe"])
def test_other_implementations_fall_back(implementation: str) -> None:
    """Neither runs on a CPU: the reason alone."""
    _, fused = pair("qwen3_moe")
    fused.config._experts_implementation = implementation
    report = lora_fast.report(fused)
    reasons = {line.obstacle for line in report.layers}
    assert reasons == {f"experts_implementation {implementation}"}


@needs_fused
def test_undecorated_families_fall_back() -> None:
    """Llama 4's experts read rows that are sorted already."""
    base = expert_base("llama4_text", None, num_local_experts=2, interleave_moe_layer_step=1)
    stock = adapted(base, expert_parameters(base))
    fused = lora_fast.accelerate(copy.deepcopy(stock))
    assert_models_agree(results(fused), results(stock))
    report = lora_fast.report(fused)
    reason = "Llama4TextExperts is not decorated as transformers decorates experts"
    assert {line.obstacle for line in report.layers} == {reason} == set(report.fallback_calls)


@needs_fused
def test_a_router_is_not_reported_as_experts() -> None:
    """``target_parameters`` of a router, as PEFT's "all-linear" has them in some families."""
    base = expert_base("qwen3_moe", None)
    stock = adapted(base, ["gate.weight"])
    fused = lora_fast.accelerate(copy.deepcopy(stock))
    assert_models_agree(results(fused), results(stock))
    report = lora_fast.report(fused)
    reason = "Qwen3MoeTopKRouter holds no experts"
    assert {line.obstacle for line in report.layers} == {reason} == set(report.fallback_calls)


@needs_fused
def test_equal_bits_and_gradients_of_several_batches() -> None:
    _, fused = pair("qwen3_moe")
    once, again = results(fused), results(fused)
    for key, expected in once.items():
        assert expected is not None
        assert_same_bits(_given(again[key]), expected, name=key)
    fused.zero_grad()
    for _ in range(2):
        fused(**inputs()).loss.backward()
    for name, parameter in fused.named_parameters():
        if parameter.requires_grad:
            assert_same_bits(_given(parameter.grad), 2 * _given(once[name]), name=name)


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


@needs_fused
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_models_leave_their_graph_for_the_experts(packed: bool) -> None:
    """Which expert has which rows is a matter of values: the operation runs between two graphs."""
    base = expert_base("qwen3_moe", num_hidden_layers=1)
    if packed:
        lora_fast.quantize_experts(base)
    fused = lora_fast.accelerate(adapted(base, ["experts.gate_up_proj", "experts.down_proj"]))
    block = fused.get_submodule("base_model.model.model.layers.0.mlp")
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", dynamic=True)
    for tokens in (9, 5):
        x = torch.randn(1, tokens, 32)
        found, expected = (_of_a_block(called, block, x) for called in (compiled, block))
        assert_models_agree(found, expected)
    report = lora_fast.report(fused)
    assert report.fused_calls == 2 * 2 * len(wrappers(fused)) and not report.fallback_calls
    torch._dynamo.reset()


def _of_a_block(called: Any, block: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """The output and every gradient of a block that is called as itself or compiled."""
    block.zero_grad()
    x = x.requires_grad_()
    x.grad = None
    y = called(x)
    y.square().sum().backward()
    gradients = {n: p.grad for n, p in block.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **gradients}
