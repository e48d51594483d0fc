"""warm_up: what it runs, what it does not change, and how much it compiles."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from backend_calls import watch
from gated_models import counts, mlp_of, stock_model
from lora_models import peft_model, quantised
from torch import nn

import lora_fast
from bench.instruments.accuracy import assert_same_bits
from lora_fast.acceleration.warm_up import units, warm_up

BF16, FP32 = torch.bfloat16, torch.float32
PROJECTIONS = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


class Attention(nn.Module):
    """q wider than k and v, and an output: a group of three and a layer alone."""

    def __init__(self, hidden: int, kv: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv, bias=False)
        self.v_proj = nn.Linear(hidden, kv, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x):
        mixed = self.q_proj(x) * torch.cat([self.k_proj(x), self.v_proj(x)], dim=-1)
        return x + self.o_proj(torch.tanh(mixed))


class Stack(nn.Sequential):
    def __init__(self, depth: int = 3, hidden: int = 64, kv: int = 32) -> None:
        super().__init__(*(Attention(hidden, kv) for _ in range(depth)))


def _model(kind="dense", **options):
    base = Stack()
    if kind == "nf4":
        for block in base:
            quantised(block)
        base.is_loaded_in_4bit = True
    return lora_fast.accelerate(peft_model(model=base, **PROJECTIONS, **options))


def test_layers_that_are_alike_are_one_unit():
    found = units(_model())
    assert [str(unit) for unit in found] == [
        "base_model.model.0.q_proj, k_proj, v_proj",
        "base_model.model.0.o_proj",
    ]
    assert [unit.alike for unit in found] == [3, 3]


def test_what_the_kernels_depend_on_makes_other_units():
    model = _model(lora_dropout=0.1)
    layers = dict(model.named_modules())
    o = [layers[f"base_model.model.{i}.o_proj"] for i in range(3)]
    o[1].lora_A.default.weight.requires_grad_(False)
    o[2].lora_dropout.default.p = 0.2
    assert [unit.alike for unit in units(model)] == [3, 1, 1, 1]


def test_a_gated_mlp_is_one_unit():
    model = lora_fast.accelerate(stock_model())
    assert [str(unit) for unit in units(model)] == ["base_model.model.mlp"]
    before = copy.deepcopy(model.state_dict())
    assert warm_up(model.train(), (3, 70)) == 2
    assert counts(model) == (0, {})
    for name, tensor in before.items():
        assert_same_bits(model.state_dict()[name], tensor, name=name)
    mlp_of(model).act_fn.register_forward_hook(lambda *args: None)
    assert [len(unit.layers) for unit in units(model)] == [2, 1]


def test_layers_that_would_not_run_fused_are_left_out():
    model = _model()
    model.base_model.model[0].o_proj.register_forward_hook(lambda *args: None)
    model.base_model.model[1].o_proj.base_layer.register_forward_hook(lambda *args: None)
    assert [unit.alike for unit in units(model)] == [3, 2]
    assert units(peft_model()) == []


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nothing_of_the_model_changes(kind, training):
    model = _model(kind=kind, lora_dropout=0.3).train(training)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    told = []
    runs = warm_up(model, (4, 7), progress=lambda *args: told.append(args))
    assert runs == 4
    assert [done for done, _, _ in told] == [0, 1, 2, 3]
    assert {total for _, total, _ in told} == {4}
    assert told[0][2] == "base_model.model.0.q_proj, k_proj, v_proj, 4 rows"
    assert_same_bits(torch.rand(3), expected, name="random numbers")
    assert all(p.grad is None for p in model.parameters())
    assert model.training is training
    assert lora_fast.report(model).fused_calls == 0
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name], name=name)


def test_siblings_run_as_a_group(monkeypatch):
    calls = watch(monkeypatch)
    warm_up(_model(), 65)
    # With a gradient of x and without one, then without any.
    passes = ["forward", "backward"] * 2 + ["forward"]
    expected = [(name, layers) for layers in (3, 1) for name in passes]
    assert [(call.name, call.layers) for call in calls] == expected
    calls.clear()
    warm_up(_model(), 64)
    assert [(call.name, call.layers) for call in calls] == expected


def test_modules_of_lora_fast_are_warmed_up_too_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "lora_fast.peft_layers", None)
    model = lora_fast.convert(Stack(), ["q_proj", "o_proj"], r=4)
    assert [unit.alike for unit in units(model)] == [6]
    assert warm_up(model, 3) == 1


@pytest.mark.parametrize(
    ("tokens", "error", "text"),
    [
        (0, ValueError, "at least 1, got 0"),
        ((16, -1), ValueError, "got -1"),
        (2.0, TypeError, "integers"),
        (("2",), TypeError, "got str"),
        (True, TypeError, "got bool"),
    ],
)
def test_tokens_are_checked(tokens, error, text):
    with pytest.raises(error, match=text):
        warm_up(_model(), tokens)


@pytest.mark.offline
def test_the_number_of_kernels_does_not_grow_with_the_model():
    """Two units, a few kernels, whatever the depth; and a step of training compiles no other."""
    from bench.instruments import stub_driver

    model = peft_model(model=Stack(2, 256, 128), dtype=BF16, r=16, **PROJECTIONS)
    model = lora_fast.accelerate(model.train())
    with lora_fast.set_backend("triton"), stub_driver.recording(90) as log:
        warm_up(model, 2048)
        warmed = {id(kernel) for kernel in log.kernels}
        before = len(log.launches)
        x = torch.zeros(1, 100, 256, dtype=BF16)
        y = model(x)
        y.backward(torch.ones_like(y))
        model.eval()
        with torch.no_grad():
            model(x)
    assert len(log.launches) > before
    assert {id(launch.kernel) for launch in log.launches[before:]} <= warmed
    # One of them makes dB of a group's layers in one launch.
    assert len(warmed) <= 11
