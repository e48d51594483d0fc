"""The report: predictions before any call, counts after, and the table."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from gated_models import layer_of
from gated_models import stock_model as stock_gated_model
from lora_models import (
    K,
    Mlp,
    Single,
    accelerated_copy,
    lora_config,
    lora_layers,
    peft_model,
    quantised,
)
from peft import FourierFTConfig, get_peft_model
from torch import nn

import lora_fast
from lora_fast import Report
from lora_fast.acceleration import routes


def test_predicts_before_the_first_call_and_counts_after() -> None:
    model = accelerated_copy(peft_model(model=Mlp()))
    lora_layers(model)[1].lora_A["default"].register_forward_hook(lambda *args: None)
    before = lora_fast.report(model)
    assert [(line.name, line.fused, line.obstacle) for line in before.layers] == [
        ("base_model.model.fc1", True, None),
        ("base_model.model.fc2", False, "hooks on lora_A"),
    ]
    assert (before.fused_calls, before.fallback_calls, before.all_fused) == (0, {}, False)
    for _ in range(3):
        model(torch.randn(2, K))
    after = lora_fast.report(model)
    assert [line.fused_calls for line in after.layers] == [3, 0]
    assert [line.fallback_calls for line in after.layers] == [{}, {"hooks on lora_A": 3}]
    assert (after.fused_calls, after.fallback_calls) == (3, {"hooks on lora_A": 3})
    assert before.fused_calls == 0, "a report does not change afterwards"


def test_counts_every_reason_apart() -> None:
    model = accelerated_copy(peft_model()).eval()
    x = torch.randn(2, K)
    model(x)
    with model.disable_adapter():
        model(x)
        model(x)
    model.merge_adapter()
    model(x)
    model.unmerge_adapter()
    (line,) = lora_fast.report(model).layers
    assert line.fused_calls == 1
    assert line.fallback_calls == {"adapters disabled": 2, "merged": 1}
    assert line.fused


def test_all_fused_means_no_exception_at_all() -> None:
    model = accelerated_copy(peft_model(model=Mlp()))
    assert lora_fast.report(model).all_fused
    model(torch.randn(2, K))
    assert lora_fast.report(model).all_fused
    assert "all_fused" not in str(lora_fast.report(model))
    with model.disable_adapter():
        model(torch.randn(2, K))
        disabled = lora_fast.report(model)
    report = lora_fast.report(model)
    assert not report.all_fused and not disabled.all_fused
    past = "calls fell back (2 × adapters disabled), though the next would all run fused"
    assert str(report).endswith(f"\nall_fused is False: {past}")
    both = "2 of 2 layers would fall back, and calls did (2 × adapters disabled)"
    assert str(disabled).endswith(f"\nall_fused is False: {both}")
    assert not Report(()).all_fused


def test_layers_that_are_not_accelerated_are_listed() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, K)
            self.fc = nn.Linear(K, K)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.fc(self.embed(ids))

    model = peft_model(model=Embedded(), target_modules=["embed", "fc"])
    assert [(line.kind, line.obstacle) for line in lora_fast.report(model).layers] == [
        ("lora.Embedding", "lora.Embedding has no fused path"),
        ("lora.Linear", "not accelerated"),
    ]
    lora_fast.accelerate(model)
    model(torch.tensor([1, 2]))
    report = lora_fast.report(model)
    assert [line.fused for line in report.layers] == [False, True]
    assert (report.fused_calls, report.all_fused) == (1, False)
    assert [line.counted for line in report.layers] == [False, True]
    assert "not counted" in str(report).splitlines()[1]
    assert str(report).splitlines()[-2:] == [
        "1 of 2 adapted layers fused; 1 fused calls, 0 fallback calls; calls of the 1 that stay "
        "PEFT's are not counted",
        "all_fused is False: 1 of 2 layers would fall back",
    ]


def test_other_methods_of_peft_are_named() -> None:
    model = get_peft_model(Single(), FourierFTConfig(target_modules=["fc"], n_frequency=10))
    (line,) = lora_fast.report(lora_fast.accelerate(model)).layers
    assert (line.kind, line.obstacle) == (
        "fourierft.FourierFTLinear",
        "fourierft.FourierFTLinear has no fused path",
    )


def test_kinds_and_bases() -> None:
    dense = accelerated_copy(peft_model(dtype=torch.bfloat16))
    nf4 = accelerated_copy(peft_model("nf4"))
    ours = lora_fast.convert(quantised(Single()), "all-linear")
    lines = [lora_fast.report(model).layers[0] for model in (dense, nf4, ours)]
    assert [(line.kind, line.base) for line in lines] == [
        ("lora.Linear", "bfloat16"),
        ("lora.Linear4bit", "nf4"),
        ("LoRALinear", "nf4"),
    ]


def test_a_model_without_adapters_has_an_empty_report() -> None:
    report = lora_fast.report(Mlp())
    assert report.layers == ()
    assert str(report).splitlines()[-1] == (
        "0 of 0 adapted layers fused; 0 fused calls, 0 fallback calls"
    )


def test_prints_as_a_table() -> None:
    model = accelerated_copy(peft_model(model=Mlp()))
    model(torch.randn(2, K))
    with model.disable_adapter():
        model(torch.randn(2, K))
    lora_layers(model)[1].enable_adapters(False)
    assert str(lora_fast.report(model)).splitlines() == [
        "layer                 kind         base     next call                    route  "
        "fused calls  fallback calls",
        "base_model.model.fc1  lora.Linear  float32  fused                        torch  "
        "1            1 × adapters disabled",
        "base_model.model.fc2  lora.Linear  float32  fallback: adapters disabled  -      "
        "1            1 × adapters disabled",
        "1 of 2 adapted layers fused; 2 fused calls, 2 fallback calls",
        "all_fused is False: 1 of 2 layers would fall back, and calls did (2 × adapters disabled)",
    ]


def test_prediction_holds_for_every_state() -> None:
    """What the report predicts is what the next call with a fitting input does."""
    model = accelerated_copy(peft_model(lora_dropout=0.5))
    model.add_adapter("other", lora_config(lora_dropout=0.5))
    layer = lora_layers(model)[0]
    states = {
        None: lambda: model.train(),
        "adapters disabled": lambda: layer.enable_adapters(False),
        "no active adapter": lambda: (layer.enable_adapters(True), layer.set_adapter([])),
        "dropout with several adapters": lambda: layer.set_adapter(["default", "other"]),
        "merged": lambda: (model.eval(), model.merge_adapter()),
    }
    for expected, change in states.items():
        change()
        before = lora_fast.report(model).layers[0]
        assert before.obstacle == expected
        model(torch.randn(2, K))
        after = lora_fast.report(model).layers[0]
        assert after.fused_calls - before.fused_calls == (expected is None)
        if expected is not None:
            assert after.fallback_calls[expected] == 1


def test_without_peft_installed() -> None:
    """Our own modules need neither PEFT nor transformers."""
    program = """
import sys
sys.modules["peft"] = sys.modules["transformers"] = None
import torch, lora_fast
model = lora_fast.convert(torch.nn.Sequential(torch.nn.Linear(4, 4)), "all-linear")
assert lora_fast.decelerate(lora_fast.accelerate(model)) is model
model(torch.ones(2, 4))
assert lora_fast.report(model).fused_calls == 1
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_layers_of_a_gated_mlp_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerated_copy(stock_gated_model())
    monkeypatch.setattr(routes, "uses_triton", lambda device: True)
    assert [layer.route for layer in lora_fast.report(model).layers] == ["folded"] * 3
    layer_of(model, "up_proj").register_forward_hook(lambda module, args, y: y)
    assert {layer.route for layer in lora_fast.report(model).layers} == {"chosen at its first call"}
