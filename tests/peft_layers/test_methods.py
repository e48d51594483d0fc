"""DoRA, VeRA, AdaLoRA, (IA)³ and mixed batches of PEFT, accelerated, against stock PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lora_models import (
    K,
    Mlp,
    Single,
    accelerated_copy,
    assert_equal_runs,
    compare,
    counted,
    float64_copy,
    lora_config,
    method_model,
    peft_model,
    quietly,
    run,
    tuner_layers,
)
from torch import Tensor

import lora_fast
from bench.instruments.accuracy import assert_accurate, orders
from lora_fast.four_bit.layout import forbid_packing

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KINDS = ["dense", "nf4"]
METHODS = ["dora", "vera", "adalora", "ia3", "ia3-feedforward"]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("adapter", [F32, BF16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients(
    method: str, kind: str, adapter: torch.dtype, dtype: torch.dtype
) -> None:
    stock = method_model(method, kind, dtype, adapter, compute_dtype=dtype)
    fused = accelerated_copy(stock)
    x = torch.randn(3, 7, K, dtype=dtype)
    coarse = max(dtype, adapter, key=lambda d: torch.finfo(d).eps)
    autocast = dtype if dtype != F32 and adapter == F32 else None
    compare(fused, stock, x, compute_dtype=coarse, eager_autocast=autocast)
    assert counted(fused) == (1, {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [1, 8, 64, 100, 256, 1024])
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "adalora"])
def test_every_rank(method: str, r: int, kind: str) -> None:
    # A gradient of d is R sums of cancelling terms: with few of them, the rms in bfloat16 is
    # chance.
    few = r < 64 and method in ("vera", "adalora")
    for dtype in (F32,) if few else (F32, BF16):
        stock = method_model(method, kind, dtype, F32, compute_dtype=dtype, r=r)
        fused = accelerated_copy(stock)
        x = torch.randn(21, K, dtype=dtype)
        autocast = dtype if dtype != F32 else None
        compare(fused, stock, x, compute_dtype=dtype, eager_autocast=autocast)
        assert counted(fused) == (1, {})


@pytest.mark.parametrize("autocast", [BF16, F16])
@pytest.mark.parametrize("x_dtype", [F32, BF16])
@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients_under_autocast(
    method: str, x_dtype: torch.dtype, autocast: torch.dtype
) -> None:
    for kind in KINDS:
        stock = method_model(method, kind, F32, F32, compute_dtype=autocast)
        fused = accelerated_copy(stock)
        x = torch.randn(21, K).to(BF16).to(x_dtype)
        coarse = max(x_dtype, autocast, key=lambda d: torch.finfo(d).eps)
        compare(fused, stock, x, compute_dtype=coarse, autocast=autocast)
        assert counted(fused) == (1, {}), kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith("ia3")])
def test_dropout_of_the_fused_equation_and_of_stock_agree_on_average(
    method: str, kind: str
) -> None:
    """VeRA and AdaLoRA draw a mask of their own; without a mask in common, the mean decides."""
    stock = method_model(method, kind, dropout=0.3)
    fused = accelerated_copy(stock)
    x = torch.randn(4, K)
    torch.manual_seed(0)
    means = [
        torch.stack([model(x).detach() for _ in range(600)]).mean(0) for model in (fused, stock)
    ]
    forbid_packing(stock)
    exact = stock.eval()(x).detach()
    noise = (means[1] - exact).abs().max()
    assert (means[0] - exact).abs().max() <= 3 * noise
    assert counted(fused) == (600, {})


@pytest.mark.parametrize("kind", KINDS)
def test_dora_drops_the_base_product_as_stock_does(kind: str) -> None:
    """The mask is PEFT's own: equal seeds give equal results, up to rounding."""

    class Seeded(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            torch.manual_seed(3)
            return self.model(x)

    stock = Seeded(method_model("dora", kind, dropout=0.3))
    fused = Seeded(lora_fast.accelerate(copy.deepcopy(stock.model)))
    compare(fused, stock, torch.randn(3, 7, K), compute_dtype=F32)
    assert counted(fused) == (1, {})


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_the_same_parameters_to_the_same_place(method: str) -> None:
    """Three steps: DoRA's norms and AdaLoRA's scaling are read again after each."""
    stock = method_model(method, model=Mlp())
    fused = accelerated_copy(stock)
    x, target = torch.randn(9, K), torch.randn(9, 20)
    frozen = {n: p.detach().clone() for n, p in fused.named_parameters() if not p.requires_grad}
    moved = {n: p.detach().clone() for n, p in fused.named_parameters() if p.requires_grad}
    for model in (stock, fused):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
    theirs = dict(stock.named_parameters())
    for name, parameter in fused.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
        else:
            assert not torch.equal(parameter, moved[name]), name
            torch.testing.assert_close(parameter, theirs[name])
    assert counted(fused) == (6, {})


def test_dora_sees_writes_that_leave_no_version() -> None:
    """Optimizers that write through pointers, hot-swapping through .data, loading, merging."""
    stock = method_model("dora").eval()
    fused = accelerated_copy(stock)
    x = torch.randn(5, K)

    def agree() -> None:
        torch.testing.assert_close(fused(x), stock(x))

    def write(model: Any, name: str, factor: float) -> None:
        layer = tuner_layers(model)[0]
        getattr(layer, name)["default"].weight.data.mul_(factor)

    agree()
    for name in ("lora_A", "lora_B"):
        for model in (stock, fused):
            write(model, name, 3.0)
        agree()
    state = {n: t * 0.5 for n, t in stock.state_dict().items() if "lora_" in n}
    for model in (stock, fused):
        model.load_state_dict(state, strict=False)
    agree()
    weight = torch.randn(20, K)
    for model in (stock, fused):
        tuner_layers(model)[0].base_layer.weight.data = weight.clone()
        tuner_layers(model)[0].scaling["default"] = 0.7
    agree()
    for model in (stock, fused):
        quietly(model.merge_adapter)
        quietly(model.unmerge_adapter)
        tuner_layers(model)[0].base_layer.weight.data.mul_(2.0)
        quietly(model.merge_adapter)
        quietly(model.unmerge_adapter)
    agree()
    assert counted(fused) == (6, {})


def _two_adapters(kind: str, model: torch.nn.Module | None = None, **config: Any) -> Any:
    stock = peft_model(kind, model=model, **config)
    torch.manual_seed(5)
    stock.add_adapter("other", lora_config(r=3, lora_alpha=9, **config))
    stock.base_model.set_adapter(["default", "other"])
    return stock


NAMES = ["default", "other", "__base__", "other", "default", "absent"]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(6, K), (6, 5, K), (6, 2, 3, K)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batch(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A sample runs through its own adapter alone; stock PEFT's values and gradients."""
    stock = _two_adapters(kind).base_model
    stock = stock.to(dtype) if kind == "dense" else stock
    if kind == "nf4":
        for layer in tuner_layers(stock):
            layer.base_layer.compute_dtype = dtype
    forbid_packing(stock.eval())
    names = [n for n in NAMES if n != "absent"] + ["__base__"]

    class Mixed(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.layer = tuner_layers(model)[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, adapter_names=names)

    x = torch.randn(shape).to(dtype)
    fused, plain = Mixed(accelerated_copy(stock)), Mixed(stock)
    autocast = dtype if kind == "nf4" and dtype != F32 else None
    if kind == "nf4" and len(shape) > 2:
        # Stock PEFT writes into a view here, which autograd forbids: the values alone.
        with torch.no_grad():
            ref64, eager = float64_copy(plain)(x.double()), orders(lambda: plain(x))
            assert_accurate(fused(x), ref64, eager, name="y", compute_dtype=dtype)
    else:
        compare(fused, plain, x, compute_dtype=dtype, eager_autocast=autocast)
    assert counted(fused) == (1, {})


def test_mixed_batch_through_the_whole_model_and_in_training() -> None:
    stock = _two_adapters("dense", model=Mlp(), lora_dropout=0.5)
    fused = accelerated_copy(stock)
    x = torch.randn(6, K)
    names = ["default", "other", "__base__", "other", "default", "default"]
    torch.testing.assert_close(
        fused.eval()(x, adapter_names=names), stock.eval()(x, adapter_names=names)
    )
    assert counted(fused) == (2, {})
    layer = tuner_layers(fused.train())[0]
    y = layer(x, adapter_names=names)
    y.sum().backward()
    assert counted(fused) == (3, {}), "one mask serves two adapters of the same p"
    torch.testing.assert_close(y[2], layer.base_layer(x)[2])
    assert all(layer.lora_A[name].weight.grad.abs().sum() > 0 for name in ("default", "other"))
    layer.lora_dropout["other"].p = 0.1
    layer(x, adapter_names=names)
    assert counted(fused) == (3, {"dropout with several adapters": 1})


def test_mixed_batch_of_the_wrong_length_raises_as_stock_does() -> None:
    stock = _two_adapters("dense").eval()
    fused = accelerated_copy(stock)
    messages = []
    for model in (stock, fused):
        with pytest.raises(ValueError, match="adapter_names") as error:
            tuner_layers(model)[0](torch.randn(3, K), adapter_names=["default"])
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert counted(fused) == (0, {"length of adapter_names": 1})


def test_mixed_batch_with_dora_falls_back() -> None:
    stock = _two_adapters("dense", use_dora=True).eval()
    fused = accelerated_copy(stock)
    names = ["default", "other"]
    for model in (stock, fused):
        with pytest.raises(ValueError, match="when DoRA is enabled"):
            model(torch.randn(2, K), adapter_names=names)
    assert counted(fused) == (0, {"DoRA with several adapters": 1})


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("vera", "several VeRA adapters"),
        ("dora", "DoRA with several adapters"),
    ],
)
def test_several_adapters_that_cannot_be_stacked(method: str, reason: str) -> None:
    stock = method_model(method, adapters=2)
    fused = accelerated_copy(stock)
    x = torch.randn(4, K)
    assert_equal_runs(run(fused, x), run(stock, x))
    assert counted(fused) == (0, {reason: 1})


@pytest.mark.parametrize("method", ["adalora", "ia3", "ia3-feedforward"])
def test_several_adapters_in_one_call(method: str) -> None:
    stock = method_model(method, adapters=2)
    fused = accelerated_copy(stock)
    compare(fused, stock, torch.randn(9, K), compute_dtype=F32)
    assert counted(fused) == (1, {})


@pytest.mark.parametrize("method", METHODS)
def test_the_switched_off_states_fall_back(method: str) -> None:
    stock = method_model(method)
    fused = accelerated_copy(stock)
    x = torch.randn(4, K)
    with stock.disable_adapter(), fused.disable_adapter():
        assert_equal_runs(run(fused, x), run(stock, x))
    for model in (stock, fused):
        quietly(model.merge_adapter)
    assert_equal_runs(run(fused, x), run(stock, x))
    assert counted(fused) == (0, {"adapters disabled": 1, "merged": 1})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_accelerating_changes_no_key_and_no_repr(method: str, kind: str) -> None:
    stock = method_model(method, kind)
    fused = accelerated_copy(stock)
    assert repr(fused) == repr(stock)
    fused(torch.randn(2, K))
    assert list(fused.state_dict()) == list(stock.state_dict())
    again = lora_fast.decelerate(fused)
    assert type(tuner_layers(again)[0]) is type(tuner_layers(stock)[0])
    assert vars(tuner_layers(again)[0]).keys() == vars(tuner_layers(stock)[0]).keys()


def test_adalora_trains_with_its_own_allocator() -> None:
    stock = method_model("adalora", model=Mlp())
    fused = accelerated_copy(stock)
    x, target = torch.randn(9, K), torch.randn(9, 20)
    ranks = []
    for model in (stock, fused):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for step in range(1, 8):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
        singular = [layer.lora_E["default"].detach() for layer in tuner_layers(model)]
        ranks.append(torch.cat(singular))
    assert (ranks[0] == 0).any(), "the allocator has pruned"
    assert torch.equal(ranks[0] == 0, ranks[1] == 0)
    torch.testing.assert_close(ranks[0], ranks[1])
    assert not counted(fused)[1]


def test_single_is_what_the_accuracy_rule_measures() -> None:
    assert [type(layer).__name__ for layer in tuner_layers(method_model("vera"))] == ["Linear"]
    assert isinstance(method_model("vera").get_base_model(), Single)


def test_the_order_of_adalora_adapters_does_not_show() -> None:
    """PEFT's own tests ask for it, with outputs so large that rounding would show."""
    model = accelerated_copy(method_model("adalora", adapters=2))
    x, outputs = torch.randn(9, K), []
    for order in (["default", "adapter1"], ["adapter1", "default"]):
        model.base_model.set_adapter(order, inference_mode=True)
        outputs.append(model(x))
    assert torch.equal(*outputs)
    assert counted(model) == (2, {})
