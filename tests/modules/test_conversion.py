"""convert: the layers it adapts, the parameters it freezes, and that it changes all or nothing."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from lora_models import K, Mlp, Single, counted, nf4_linear, peft_model, quantised, run
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import lora_fast
from bench.instruments.accuracy import assert_all_accurate, orders
from lora_fast import LoRALinear
from lora_fast.modules import conversion

F32, BF16 = torch.float32, torch.bfloat16


def _llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=31,
        )
    )


def _classifier() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=31,
        )
    )


def _adapted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _adapted_by_peft(model: nn.Module, target_modules: Any, **config: Any) -> set[str]:
    wrapped = get_peft_model(model, LoraConfig(target_modules=target_modules, **config))
    return {
        name.removeprefix("base_model.model.")
        for name, module in wrapped.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize(
    "target_modules",
    [
        ["q_proj", "v_proj"],
        {"down_proj"},
        ["model.layers.1.self_attn.o_proj", "gate_proj"],
        ["self_attn.k_proj"],
        r".*\.layers\.0\..*(up|down)_proj",
        "all-linear",
        "All-Linear",
    ],
)
def test_targets_are_those_of_peft(target_modules: Any) -> None:
    model = lora_fast.convert(_llama(), target_modules, r=2)
    expected = _adapted_by_peft(_llama(), target_modules)
    assert _adapted(model) == expected
    assert "lm_head" not in expected


def test_all_linear_leaves_the_head_of_a_classifier() -> None:
    model = lora_fast.convert(_classifier(), "all-linear", modules_to_save=["classifier"])
    expected = _adapted_by_peft(_classifier(), "all-linear", task_type=TaskType.SEQ_CLS)
    assert _adapted(model) == expected
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name for name in trainable if name.endswith(("lora_A", "lora_B"))}
    assert trainable - adapters == {"classifier.weight", "classifier.bias"}


def test_modules_to_save_are_never_adapted() -> None:
    model = lora_fast.convert(Mlp(), "all-linear", modules_to_save=["fc2"])
    assert _adapted(model) == {"fc1"}
    assert model.fc2.weight.requires_grad and not model.fc1.base_layer.weight.requires_grad


def test_returns_the_model_and_keeps_its_function() -> None:
    model = Mlp()
    x = torch.randn(3, K)
    before = model(x)
    assert lora_fast.convert(model, ["fc1", "fc2"], r=3, lora_alpha=9, lora_dropout=0.1) is model
    assert (model.fc1.r, model.fc1.lora_alpha, model.fc1.lora_dropout) == (3, 9, 0.1)
    assert model.fc1.lora_A.dtype == F32
    assert torch.equal(model.eval()(x), before), "B starts as zero"
    assert counted(model) == (2, {})


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("bias", "kind"), [(True, "nf4"), (False, "fp4")])
def test_quantize(bias: bool, kind: Any, dtype: torch.dtype) -> None:
    model = Single(bias).to(dtype)
    linear = model.fc
    expected = nf4_linear(linear, dtype, quant_type=kind)
    model = lora_fast.convert(model, "all-linear", quantize=kind)
    base = model.fc.base_layer
    assert type(base) is bnb.nn.Linear4bit
    assert torch.equal(base.weight.data, expected.weight.data)
    state = base.weight.quant_state
    assert (state.dtype, state.nested, state.quant_type) == (dtype, True, kind)
    assert base.compute_dtype == dtype and base.bias is linear.bias
    assert linear.weight.dtype == dtype, "the dense layer itself is not modified"
    assert repr(base) == repr(expected)
    x = torch.randn(4, K, dtype=dtype)
    assert torch.equal(base(x), expected(x))
    assert set(model.state_dict()) == {
        key.replace("fc.", "fc.base_layer.") for key in _state_keys(expected)
    } | {"fc.lora_A", "fc.lora_B"}


def _state_keys(linear: nn.Module) -> set[str]:
    return {f"fc.{key}" for key in linear.state_dict()}


def test_four_bit_layers_are_taken_as_they_are() -> None:
    model = quantised(Mlp(), BF16, compress_statistics=False)
    bases = [model.fc1, model.fc2]
    lora_fast.convert(model, ["fc1", "fc2"], quantize="nf4")
    assert [model.fc1.base_layer, model.fc2.base_layer] == bases


def test_a_shared_layer_stays_shared() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(K, K)
            self.second = self.first
            self.blocks = nn.ModuleList([Mlp()] * 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.second(self.first(x)))

    model = lora_fast.convert(Shared(), ["first", "second", "fc1"])
    assert isinstance(model.first, LoRALinear) and model.first is model.second
    assert model.blocks[0].fc1 is model.blocks[1].fc1
    model(torch.randn(2, K))
    assert counted(model) == (3, {})


@pytest.mark.parametrize("quantize", [None, "nf4", "fp4"])
def test_values_and_gradients_of_a_model(quantize: Any) -> None:
    model = lora_fast.convert(Mlp(), "all-linear", r=3, quantize=quantize)
    for layer in (model.fc1, model.fc2):
        nn.init.normal_(layer.lora_B, std=0.1)
    eager = copy.deepcopy(model)
    for layer in (eager.fc1, eager.fc2):
        layer.forward = layer._plain
    wide = copy.deepcopy(eager)
    for layer in (wide.fc1, wide.fc2):
        _make_dense(layer)
        layer.forward = layer._plain
    x = torch.randn(9, K)
    plain = orders(lambda: run(eager, x))
    assert_all_accurate(run(model, x), run(wide.double(), x.double()), plain)
    assert counted(model) == (2, {})
    assert counted(eager) == (0, {})


def _make_dense(layer: LoRALinear) -> None:
    """Decode a 4-bit base without rounding, so that the layer can compute in float64."""
    if isinstance(layer.base_layer, bnb.nn.Linear4bit):
        weight = lora_fast.NF4Weight.from_params4bit(layer.base_layer.weight).dequantize(F32)
        bias = layer.base_layer.bias
        layer.base_layer = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None)
        layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.base_layer.bias = bias


def _with_conv() -> nn.Module:
    return nn.ModuleDict({"conv": nn.Conv1d(2, 2, 1), "fc": nn.Linear(2, 2)})


def _with_int8() -> nn.Module:
    return nn.ModuleDict({"fc": nn.Linear(2, 2), "int8": bnb.nn.Linear8bitLt(2, 2)})


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (Mlp, {"target_modules": ["fc1", "fc3", "q"]}, ValueError, r"got 'fc3', 'q'; .* fc1, fc2"),
        (Mlp, {"target_modules": []}, ValueError, "at least one layer, got an empty list"),
        (Mlp, {"target_modules": "fc9.*"}, ValueError, r"got 'fc9\.\*'; it has fc1, fc2"),
        (Mlp, {"target_modules": "fc("}, ValueError, "must be a regular expression"),
        (Mlp, {"target_modules": ["fc1", 2]}, TypeError, "got 2"),
        (Mlp, {"target_modules": None}, TypeError, "target_modules .*got None"),
        (_with_conv, {"target_modules": ["conv"]}, TypeError, "'conv': linear must be .* Conv1d"),
        (_with_int8, {"target_modules": ["int8"]}, ValueError, "'int8'.*Linear8bitLt"),
        (_with_int8, {"target_modules": "all-linear"}, ValueError, "'int8'.*Linear8bitLt"),
        (Mlp, {"r": 0}, ValueError, "r must be at least 1, got 0"),
        (Mlp, {"r": "8"}, TypeError, "r must be an int, got str"),
        (Mlp, {"lora_alpha": float("nan")}, ValueError, "lora_alpha must be finite, got nan"),
        (Mlp, {"lora_dropout": -0.1}, ValueError, "lora_dropout must lie in"),
        (Mlp, {"dtype": torch.uint8}, TypeError, "dtype must be a floating point dtype"),
        (Mlp, {"quantize": "int8"}, ValueError, "quantize must be one of .*'fp4'.*, got 'int8'"),
        (Mlp, {"method": "ia3"}, ValueError, "method must be one of lora, dora, vera, got 'ia3'"),
        (Mlp, {"method": "vera", "lora_alpha": 8}, ValueError, "lora_alpha and use_rslora must"),
        (Mlp, {"modules_to_save": ["head"]}, ValueError, "modules_to_save must .*got 'head'"),
        (Mlp, {"modules_to_save": "fc1"}, TypeError, "modules_to_save must be a list"),
        (Mlp, {"modules_to_save": ["fc1", "fc2"]}, ValueError, "not in modules_to_save"),
        (
            lambda: quantised(Mlp()),
            {"modules_to_save": ["fc2"]},
            ValueError,
            "modules_to_save must be trainable, got 'fc2' with quantised weights",
        ),
        (lambda: nn.Linear(2, 2), {}, ValueError, "use LoRALinear.from_linear"),
        (lambda: lora_fast.convert(Mlp(), ["fc1"]), {}, ValueError, "adapted layer at 'fc1'"),
        (lambda: peft_model(), {}, ValueError, "use lora_fast.accelerate"),
    ],
)
def test_wrong_input_changes_nothing(
    model: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = model()
    before = _state(built)
    with pytest.raises(error, match=message):
        lora_fast.convert(built, **{"target_modules": "all-linear", **arguments})
    assert _state(built) == before


def _state(model: nn.Module) -> tuple[Any, ...]:
    parameters = [
        (name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()
    ]
    return [(name, id(module)) for name, module in model.named_modules()], parameters


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        lora_fast.convert({}, "all-linear")


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_failure_half_way_changes_nothing(quantize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class FailsAtSecond(LoRALinear):
        made = 0

        def reset_parameters(self) -> None:
            FailsAtSecond.made += 1
            if FailsAtSecond.made == 2:
                raise MemoryError("no room for the adapter")

    monkeypatch.setattr(conversion, "LoRALinear", FailsAtSecond)
    model = Mlp()
    before = _state(model)
    with pytest.raises(MemoryError):
        lora_fast.convert(model, "all-linear", quantize=quantize)
    assert FailsAtSecond.made == 2
    assert _state(model) == before
