"""A gated MLP as one operation: stock PEFT's results, less saved, and counted."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from gated_models import (
    NAMES,
    WIDTH,
    BothInOne,
    GatedMLP,
    H,
    Model,
    counts,
    layer_of,
    mlp_of,
    reported,
    stock_model,
)
from lora_models import accelerated_copy, compare, counted, lora_layers, run
from model_families import inputs, tiny_model
from opaque_bases import bytes_saved
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_fast
from bench.instruments.accuracy import ORDER_DIFFERENCE, assert_agree, assert_same_bits
from bench.instruments.saved_tensors import SavedTensors

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Families, and how many gated MLPs of two layers have an adapter.
FAMILIES = {
    **dict.fromkeys(
        ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "granite", "olmo",
         "olmo2", "smollm3", "phi3", "glm", "glm4", "stablelm", "seed_oss"),
        2,
    ),
    # One dense layer, and the shared experts of the other.
    "deepseek_v2": 2, "deepseek_v3": 2, "glm4_moe": 2, "qwen2_moe": 2,
    "gpt_neox": 0,
}  # fmt: skip


class Plain(nn.Module):
    """A model without a config, by which PEFT would choose parameters of experts instead."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**inputs()).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = tiny_model(family)
    if "deepseek" in family or "moe" in family:
        lora.target_modules = r".*(mlp|shared_experts?)\.(gate|up|down)_proj"
        model = Plain(model)
    stock = get_peft_model(model, lora).eval()
    fused = accelerated_copy(stock)
    expected, found = gradients(stock), gradients(fused)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None
            continue
        assert_agree(found[name], gradient, within=ORDER_DIFFERENCE, name=name)
    mlps = lora_fast.report(fused).mlps
    assert [mlp.fused_calls for mlp in mlps if mlp.fused] == [1] * FAMILIES[family]
    assert not any(mlp.fallback_calls for mlp in mlps)
    assert counted(fused)[0] == len(lora_layers(fused))


# The bytes that an MLP saves for a token, over 2 · (H + 2 I), which is x, gate and up.
MOST_SAVED = 1.06
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 1, "head_dim": 64}


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "granite", "olmo2", "smollm3", "phi3"],
)
def test_saved_bytes(family: str) -> None:
    base = tiny_model(family, **SIZES)
    mlp = next(m for m in base.modules() if hasattr(m, "down_proj"))
    lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(Model(mlp).to(BF16), lora, autocast_adapter_dtype=False).to(BF16)
    lora_fast.accelerate(model)
    x = torch.randn(1, 64, 512, dtype=BF16, requires_grad=True)
    with SavedTensors(model.parameters()) as saved:
        model(x).sum().backward()
    assert saved.bytes <= MOST_SAVED * 2 * (512 + 2 * 1408) * 64
    assert saved.bytes >= 2 * (512 + 2 * 1408) * 64
    assert counts(model) == (1, {})


# Kind and dtype of the base, dtypes of its adapters and of x, and that of autocast.
DTYPES = [
    case
    for case in itertools.product(("dense", "nf4"), *[(F32, BF16)] * 3, (None, BF16))
    if case[0] == "nf4" or case[1] is case[3] or case[4] is not None  # else PEFT raises
]


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize(("kind", "dtype", "adapter", "x_dtype", "autocast"), DTYPES, ids=str)
def test_dtypes(
    kind: str, dtype: torch.dtype, adapter: torch.dtype, x_dtype: torch.dtype, autocast: Any
) -> None:
    compute = autocast or (dtype if kind == "nf4" else x_dtype)
    # Nothing is computed in a wider dtype than the layers return, which would save more.
    narrows = x_dtype is BF16 and compute is F32
    stock = stock_model(
        kind, dtype=dtype, adapter_dtype=adapter, compute_dtype=dtype if kind == "nf4" else None
    )
    fused = accelerated_copy(stock)
    x = torch.randn(3, 7, H).to(x_dtype)
    coarsest = BF16 if narrows else compute
    compare(fused, stock, x, compute_dtype=coarsest, autocast=autocast, layers=3)
    called, others = counts(fused)
    assert (called, bool(others)) == ((0, True) if narrows else (1, False))
    assert counted(fused) == (3, {})


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(
    "targets", [NAMES[:1], NAMES[1:2], NAMES[2:], NAMES[:2], NAMES[1:], NAMES], ids=str
)
def test_some_of_the_layers_are_adapted(targets: tuple[str, ...], p: float) -> None:
    stock = stock_model(target_modules=list(targets), lora_dropout=p)
    fused = accelerated_copy(stock)
    x = torch.randn(5, H)
    compare(fused, stock, x, compute_dtype=F32, layers=3)
    assert counts(fused) == (1, {})
    assert counted(fused) == (len(targets), {})
    fused.train()
    first = seeded(fused, x)
    for name, tensor in seeded(fused, x).items():
        assert_same_bits(tensor, first[name], name=name)


def seeded(model: Any, x: Tensor) -> dict[str, Any]:
    torch.manual_seed(3)
    return {name: t.clone() for name, t in run(model, x).items() if t is not None}


def dora(model: Any, name: str) -> None:
    config = {"r": 4, "init_lora_weights": False, "target_modules": r".*_proj"}
    model.add_adapter("dora", LoraConfig(use_dora=True, **config))
    for each in NAMES:
        layer_of(model, each).set_adapter("dora" if each == name else "default")


def other_rank(model: Any, name: str) -> None:
    config = {"r": 9, "init_lora_weights": False, "target_modules": r".*_proj"}
    model.add_adapter("other", LoraConfig(lora_dropout=0.5, **config))
    for each in NAMES:
        layer_of(model, each).set_adapter("other" if each == name else "default")


def another_class(model: Any, name: str) -> None:
    class Wrapped(nn.Module):
        def __init__(self, of: nn.Module) -> None:
            super().__init__()
            self.of, self.in_features, self.out_features = of, of.in_features, of.out_features

        def forward(self, x: Tensor) -> Tensor:
            return self.of(x)

    mlp = mlp_of(model)
    setattr(mlp, name, Wrapped(mlp._modules[name]))


def trains(model: Any, name: str) -> None:
    layer_of(model, name).base_layer.weight.requires_grad_()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [dora, other_rank, another_class, trains])
def test_one_layer_is_another(change: Any, name: str) -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    for model in (stock, fused):
        torch.manual_seed(7)
        change(model, name)
        model.eval()
    x = torch.randn(4, 3, H)
    compare(fused, stock, x, compute_dtype=F32, layers=3)
    assert counts(fused) == (1, {})
    assert reported(fused).fused
    assert (name in reported(fused).alone) == (change is not other_rank)
    assert counted(fused) == (3, {})


@pytest.mark.parametrize("targets", [NAMES, NAMES[:1], NAMES[2:]], ids=str)
def test_layers_that_are_all_computed_by_themselves(targets: tuple[str, ...]) -> None:
    """Between them the activation is one operation, which saves nothing but gate and up."""
    stock = stock_model(target_modules=list(targets), use_dora=True)
    fused = accelerated_copy(stock)
    x = torch.randn(4, 3, H)
    compare(fused, stock, x, compute_dtype=F32, layers=3)
    assert counts(fused) == (1, {})
    assert set(reported(fused).alone) == set(targets)
    assert counted(fused) == (len(targets), {})
    unfused = lora_fast.accelerate(copy.deepcopy(stock), fuse_mlp=False)
    x.requires_grad_()
    saved, expected = (bytes_saved(model, lambda m=model: m(x)) for model in (fused, unfused))
    assert saved == expected - F32.itemsize * x.shape[0] * x.shape[1] * WIDTH, "act(gate)"


def test_an_8_bit_gate() -> None:
    base = Model()
    gate = bnb.nn.Linear8bitLt(H, WIDTH, bias=False, has_fp16_weights=False)
    gate.load_state_dict(base.mlp.gate_proj.state_dict())
    base.mlp.gate_proj = gate.to("cpu")  # type: ignore[assignment]
    base.is_loaded_in_8bit = True  # type: ignore[assignment]
    lora = LoraConfig(r=4, target_modules=list(NAMES), init_lora_weights=False)
    stock = get_peft_model(base, lora).eval()
    fused = accelerated_copy(stock)
    x = torch.randn(3, H)
    expected = run(stock, x)
    for name, tensor in run(fused, x).items():
        assert_agree(tensor, expected[name], within=ORDER_DIFFERENCE, name=name)
    assert counts(fused) == (1, {})
    assert list(reported(fused).alone) == ["gate_proj"]
    assert counted(fused)[1] == {}


def test_gate_and_up_in_one_layer() -> None:
    stock = stock_model(mlp=BothInOne())
    fused = accelerated_copy(stock)
    compare(fused, stock, torch.randn(4, 3, H), compute_dtype=F32, layers=3)
    assert counts(fused) == (1, {})
    assert reported(fused).activation == "gelu_tanh"


def test_modules_without_peft() -> None:
    torch.manual_seed(0)
    model = lora_fast.convert(Model(), list(NAMES), r=3, fuse_mlp=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    x = torch.randn(4, H)
    expected = run(model, x)
    lora_fast.accelerate(model)
    for name, tensor in run(model, x).items():
        assert_agree(tensor, expected[name], within=ORDER_DIFFERENCE, name=name)
    assert counts(model) == (1, {})
    lora_fast.decelerate(model)
    assert type(mlp_of(model)) is GatedMLP
    converted = lora_fast.convert(Model(), list(NAMES), r=3)
    converted(x)
    assert counts(converted) == (1, {})
    with pytest.raises(TypeError, match="fuse_mlp must be a bool, got int"):
        lora_fast.convert(Model(), list(NAMES), fuse_mlp=1)


def test_a_second_backward_gives_the_same_bits() -> None:
    model = lora_fast.accelerate(stock_model(lora_dropout=0.5)).train()
    x = torch.randn(4, H, requires_grad=True)
    y = model(x)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    first = torch.autograd.grad(y.sum(), trained, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(y.sum(), trained), strict=True):
        assert_same_bits(two, one, name="gradient")
    assert counts(model) == (1, {})


def test_without_gradients_and_with_those_of_x_alone() -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    x = torch.randn(4, H)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_agree(fused(x), stock(x), within=ORDER_DIFFERENCE)
    for model in (fused, stock):
        model.requires_grad_(False)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    fused(ours).sum().backward()
    stock(theirs).sum().backward()
    assert_agree(ours.grad, theirs.grad, within=ORDER_DIFFERENCE)
    assert counts(fused) == (3, {})
