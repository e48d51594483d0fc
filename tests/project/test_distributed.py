"""Existing engines around fused layers: two processes end where one does."""

from __future__ import annotations

import re

import pytest
import torch
from distributed_runs import (
    EXAMPLES,
    SCENARIOS,
    SCENARIOS_OF_EXPERTS,
    Example,
    Result,
    Scenario,
    run_everything,
    train,
)
from expert_models import FUSES
from lora_models import K, N, peft_model
from torch import nn

import lora_fast
from lora_fast.features import SHARDED_INTEGERS

# Layers whose own modules an engine has taken over run PEFT's code, and say why.
FALLBACKS = {
    "fsdp2-children": {"lora_A is FSDPLinear": 12},
    "fsdp2-children-nf4": {"lora_A is FSDPLinear": 12},
}


# Which fully_shard of an older torch refuses.
STORED_AS_INTEGERS = (
    "fsdp2-own-nf4",
    "fsdp2-nf4-uint8",
    "fsdp2-children-nf4",
    "experts-fsdp2-nf4",
    "experts-fsdp2-nf4-reentrant",
)

Results = list[dict[str, Result | Example | str]]


@pytest.fixture(scope="module")
def two_processes() -> Results:
    return run_everything(world=2)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_what_one_does(name: str, two_processes: Results) -> None:
    check(name, SCENARIOS[name], two_processes)


@pytest.mark.skipif(not FUSES, reason="needs PEFT 0.19.1 and transformers' flags")
@pytest.mark.parametrize("name", SCENARIOS_OF_EXPERTS)
def test_two_processes_train_experts_as_one_does(name: str, two_processes: Results) -> None:
    check(name, SCENARIOS_OF_EXPERTS[name], two_processes)


def check(name: str, scenario: Scenario, two_processes: Results) -> None:
    alone = train(scenario)
    assert alone.fallbacks == {} and alone.fused_calls > 0
    for rank in two_processes:
        result = rank[name]
        if name in STORED_AS_INTEGERS and not SHARDED_INTEGERS.is_on():
            assert "fully_shard" in str(result) and "floating point" in str(result)
            continue
        assert isinstance(result, Result), result
        expected = FALLBACKS.get(name, {})
        assert result.fallbacks == expected
        assert result.fused_calls == alone.fused_calls - sum(expected.values())
        assert result.parameters.keys() == alone.parameters.keys()
        for parameter, value in alone.parameters.items():
            error = (result.parameters[parameter] - value).abs().max().item()
            assert error <= 1e-6, f"{parameter} is {error:.1e} away"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_have_the_losses_of_one_process(name: str, two_processes: Results) -> None:
    first, second = (rank[name] for rank in two_processes)
    assert isinstance(first, Example), first
    assert (first.status, second) == (0, Example(0, ""))
    assert "fused calls, fallbacks: none" in first.printed
    losses = re.findall(r"^loss (\S+) → (\S+) in (2 processes|one)$", first.printed, re.MULTILINE)
    assert [where for *_, where in losses] == ["2 processes", "one"]
    assert all(float(last) < 0.8 * float(start) for start, last, _ in losses)
    apart = re.search(r"largest relative difference of a step's loss (\S+),", first.printed)
    assert apart is not None and float(apart.group(1)) <= 1e-4


def partitioned(parameter: nn.Parameter, number: int) -> None:
    """As DeepSpeed ZeRO-3 leaves a parameter between two uses of it."""
    parameter.ds_id = number  # type: ignore[attr-defined]
    parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
    parameter.data = torch.empty(0)


@pytest.mark.parametrize("hooked", [False, True])
def test_zero3_is_left_to_peft(hooked: bool) -> None:
    """ZeRO-3 gathers a parameter in hooks of its module, so that module must be called."""
    model = lora_fast.accelerate(peft_model())
    (layer,) = (m for m in model.modules() if hasattr(m, "lora_A"))
    modules = [layer.lora_A["default"], layer.lora_B["default"], layer.base_layer]
    full = [module.weight.data for module in modules]
    x = torch.randn(3, K)
    expected = model(x)
    for number, (module, data) in enumerate(zip(modules, full, strict=True)):
        partitioned(module.weight, number)
        if hooked:
            module.register_forward_pre_hook(
                lambda module, _, data=data: setattr(module.weight, "data", data)
            )
    reason = "lora_A is partitioned by DeepSpeed ZeRO-3"
    assert lora_fast.report(model).layers[0].obstacle == reason
    if hooked:
        torch.testing.assert_close(model(x), expected)
        assert lora_fast.report(model).fallback_calls == {reason: 1}


def test_zero3_layers_are_not_converted() -> None:
    linear = nn.Linear(K, N)
    partitioned(linear.weight, 0)
    with pytest.raises(ValueError, match="weight is partitioned by DeepSpeed ZeRO-3"):
        lora_fast.LoRALinear.from_linear(linear, r=2)
