"""Weights that bitsandbytes packed for a CPU are unpacked exactly, and not packed again."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import pytest
import torch
from cpu_kinds import bitsandbytes_packs, forced
from four_bit_formula import formula
from lora_models import lora_config, quietly, run
from peft import get_peft_model
from torch import Tensor, nn

import lora_fast
from bench.instruments.accuracy import assert_same_bits
from lora_fast import NF4Weight
from lora_fast.four_bit.layout import forbid_packing, plain_bytes, resume_packing, suspend_packing
from lora_fast.optim import DeltaLoRA
from lora_fast.planning.states import quantised_bytes
from lora_fast.trainable import mark_layer_norm

pytestmark = pytest.mark.skipif(
    not bitsandbytes_packs(), reason="this bitsandbytes packs no weights for a CPU"
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

FORMATS = [
    pytest.param(F16, True, 64, torch.uint8, id="nested"),
    pytest.param(BF16, False, 32, BF16, id="plain-in-bfloat16"),
    pytest.param(F32, True, 128, F32, id="nested-in-float32"),
]
formats = pytest.mark.parametrize(("dtype", "nested", "blocksize", "storage"), FORMATS)


@pytest.fixture(autouse=True)
def _packs() -> Any:
    """A CPU on which bitsandbytes packs."""
    with forced("packed"):
        yield


def linear(
    dtype: torch.dtype = F32,
    nested: bool = True,
    blocksize: int = 64,
    storage: torch.dtype = torch.uint8,
    kind: str = "nf4",
    N: int = 64,
    K: int = 128,
) -> Any:
    layer = bnb.nn.Linear4bit(
        K, N, bias=False, compute_dtype=F32, compress_statistics=nested, quant_type=kind,
        quant_storage=storage,
    )  # fmt: skip
    layer.weight.data, layer.weight.blocksize = torch.randn(N, K).to(dtype), blocksize
    return layer.to("cpu")


def infer(module: Any, K: int = 128) -> Tensor:
    """A call in eval mode without gradients, after which a layer that may pack has packed."""
    training = module.training
    with torch.no_grad():
        y = module.eval()(torch.randn(3, K))
    module.train(training)
    return y


def is_packed(layer: Any) -> bool:
    return bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


def four_bit_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]


@formats
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_packed_weight_is_unpacked_exactly(
    dtype: torch.dtype, nested: bool, blocksize: int, storage: torch.dtype, kind: str
) -> None:
    """Every code, and the absmax that packing has left: rounded to bfloat16, no more."""
    layer = linear(dtype, nested, blocksize, storage, kind)
    weight, state = layer.weight, layer.weight.quant_state
    before, data = copy.deepcopy(state), weight.data.clone()
    codes = plain_bytes(weight.data, state).clone()
    infer(layer)
    assert is_packed(layer)
    forbid_packing(layer)
    assert layer.weight is weight and weight.quant_state is layer.quant_state is state
    assert (weight.data.dtype, weight.shape) == (data.dtype, data.shape)
    assert_same_bits(plain_bytes(weight.data, state), codes, name="codes")
    if nested:
        scale = before.state2.absmax[torch.arange(before.absmax.numel()) // 256]
        before.absmax = before.state2.code[before.absmax.long()] * scale + before.offset
    assert_same_bits(state.absmax, before.absmax.bfloat16().float(), name="absmax")
    assert (state.dtype, state.nested, state.state2) == (dtype, False, None)
    infer(layer)
    assert not is_packed(layer)


@formats
def test_a_packed_weight_is_taken_by_the_operation(
    dtype: torch.dtype, nested: bool, blocksize: int, storage: torch.dtype
) -> None:
    layer = linear(dtype, nested, blocksize, storage)
    infer(layer)
    data = layer.weight.data.clone()
    weight = NF4Weight.from_params4bit(layer.weight)
    assert is_packed(layer), "the layer itself stays as it is"
    assert_same_bits(layer.weight.data.view(torch.uint8), data.view(torch.uint8), name="data")
    forbid_packing(layer)
    expected = formula(weight.packed, layer.weight.quant_state, dtype)
    assert_same_bits(weight.dequantize(), expected, name="W")


def test_packing_does_not_reach_a_weight_that_was_taken() -> None:
    """bitsandbytes changes its own description of a weight, not only the weight."""
    layer = linear()
    weight = NF4Weight.from_params4bit(layer.weight)
    expected = weight.dequantize().clone()
    infer(layer)
    assert is_packed(layer)
    assert_same_bits(weight.dequantize(), expected, name="W")


@pytest.mark.parametrize(("N", "K", "message"), [(33, 128, "divisible"), (64, 96, "invalid")])
@pytest.mark.parametrize("nested", [True, False])
def test_what_packing_has_failed_on_is_whole_again(
    N: int, K: int, message: str, nested: bool
) -> None:
    """It drops the constants of the absmax before it finds that K is no multiple of a block."""
    layer = linear(N=N, K=K, nested=nested)
    expected = NF4Weight.from_params4bit(layer.weight).dequantize()
    with pytest.raises((AssertionError, RuntimeError), match=message):
        infer(layer, K)
    taken = NF4Weight.from_params4bit(layer.weight)
    assert_same_bits(taken.dequantize(), expected, name="W")
    assert taken.nested or taken.quant_state.state2 is None
    forbid_packing(layer)
    assert layer.weight.quant_state.nested or layer.weight.quant_state.state2 is None
    infer(layer, K)


def test_a_switch_is_given_back_as_it_was() -> None:
    """By copies of the model, too; and one that was off stays off."""
    may, may_not = linear(), linear()
    may_not.support_avx512bf16_for_cpu = False
    model = nn.Sequential(may, may_not)
    suspend_packing(model)
    suspend_packing(model)
    for same in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), model):
        assert [layer.support_avx512bf16_for_cpu for layer in same] == [False, False]
        resume_packing(same)
        assert [layer.support_avx512bf16_for_cpu for layer in same] == [True, False]
        assert not any("_lora_fast" in name for layer in same for name in vars(layer))


class Net(nn.Module):
    """Two layers that get an adapter, and one beside them, in NF4 and of shapes that are packed."""

    is_loaded_in_4bit = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.head = linear(), linear(N=128, K=64), linear(N=32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


def adapted(model: nn.Module) -> Any:
    return get_peft_model(model, lora_config())  # type: ignore[arg-type]


def accelerated(model: nn.Module) -> nn.Module:
    return lora_fast.accelerate(adapted(model))


def converted(model: nn.Module) -> nn.Module:
    return lora_fast.convert(model, ["fc1"], r=4)


def with_delta_lora(model: nn.Module) -> nn.Module:
    """Stock PEFT, whose weights the optimizer overwrites."""
    peft = adapted(model)
    trained = [p for p in peft.parameters() if p.requires_grad]
    DeltaLoRA(torch.optim.SGD(trained, lr=0.1), peft, c=1.0)
    return peft


def of_one_layer(model: Any) -> nn.Module:
    return nn.ModuleList([lora_fast.LoRALinear.from_linear(model.fc1, r=4)])


def with_trained_norms(model: Any) -> nn.Module:
    model.norm = nn.LayerNorm(32)
    mark_layer_norm(model)
    return model


WAYS = [accelerated, converted, with_delta_lora, of_one_layer, with_trained_norms]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("arrives", ["plain", "packed"])
def test_no_layer_of_a_model_of_ours_is_packed(way: Any, arrives: str) -> None:
    """Adapted or not, whoever runs it; nor one of a copy."""
    model = Net()
    if arrives == "packed":
        infer(model)
        assert all(map(is_packed, four_bit_layers(model)))
    ours = way(model)
    for same in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for layer in four_bit_layers(same):
            infer(layer, layer.in_features)
            assert not is_packed(layer)


@pytest.mark.parametrize("arrives", ["plain", "packed"])
def test_training_goes_on_after_evaluation(arrives: str) -> None:
    """Step, evaluation, step, generation, in stock PEFT's forward as well: what a model that was
    never packed does, to the bit."""
    torch.manual_seed(0)
    stock = adapted(Net())
    if arrives == "packed":
        with torch.no_grad():
            stock.base_model.model.eval()(torch.randn(3, 128))
        assert all(map(is_packed, four_bit_layers(stock)))
    ours = lora_fast.accelerate(copy.deepcopy(stock)).train()
    x = torch.randn(5, 128)
    with forced("plain"):
        never = copy.deepcopy(ours)
        expected = run(never, x)
    for _ in range(2):
        infer(ours)
        with ours.disable_adapter():
            infer(ours)
        actual = run(ours, x)
        for name, value in expected.items():
            assert (actual[name] is None) == (value is None)
            if value is not None:
                assert_same_bits(actual[name], value, name=name)
    assert lora_fast.report(ours).fused_calls > 0


def test_decelerate_lets_bitsandbytes_pack_again() -> None:
    """Weights that arrived packed get back exactly the bytes they came with."""
    model = adapted(Net()).eval()
    infer(model)
    layers = four_bit_layers(model)
    came = [layer.weight.data.clone() for layer in layers]
    lora_fast.accelerate(model)
    infer(model)
    assert not any(map(is_packed, layers))
    lora_fast.decelerate(model)
    infer(model)
    assert all(map(is_packed, layers))
    for layer, bytes_ in zip(layers, came, strict=True):
        assert_same_bits(layer.weight.data, bytes_, name="packed")


def test_merging_and_saving_take_packed_weights() -> None:
    """As they would weights whose absmax had been rounded to bfloat16 before anything else."""
    packed = adapted(Net()).eval()
    infer(packed)
    plain = copy.deepcopy(packed)
    forbid_packing(plain)
    merged = [lora_fast.accelerate(model) for model in (packed, plain)]
    states = [
        {k: v.clone() for k, v in quietly(m.merge_and_unload).state_dict().items()} for m in merged
    ]
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        assert_same_bits(states[0][name], value, name=name)


def test_packed_weights_are_planned_as_what_they_will_be() -> None:
    """In the plain layout, with float32 absmax; the layers themselves are left packed."""
    layer = linear()
    weight, state = layer.weight, layer.weight.quant_state
    infer(layer)
    found = quantised_bytes(weight)
    assert is_packed(layer)
    forbid_packing(layer)
    assert found == quantised_bytes(weight) == weight.numel() + 4 * (state.absmax.numel() + 16)


def test_where_the_cpu_lacks_the_instructions_their_product_is_not_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = linear(), torch.randn(3, 128)
    monkeypatch.setattr(bnbf, "gemv_4bit", None)
    with forced("packed", product=False), torch.no_grad():
        y = layer.eval()(x)
    assert is_packed(layer)
    forbid_packing(layer)
    W = NF4Weight.from_params4bit(layer.weight).dequantize(BF16)
    expected = torch.nn.functional.linear(x.bfloat16(), W).float()
    assert_same_bits(y, expected, name="y")


def test_a_plain_cpu_packs_nothing() -> None:
    with forced("plain"):
        layer = linear()
        infer(layer)
    assert not is_packed(layer)
