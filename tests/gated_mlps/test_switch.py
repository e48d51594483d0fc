"""Gated MLPs are switched in place, undone exactly, and stay right whatever is done to them."""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from gated_models import (
    NAMES,
    GatedMLP,
    H,
    Model,
    agree,
    counts,
    layer_of,
    mlp_of,
    reported,
    stock_model,
)
from lora_models import (
    accelerated_copy,
    assert_equal_runs,
    counted,
    lora_config,
    quantised,
    quietly,
    run,
)
from peft import get_peft_model
from torch import nn

import lora_fast
from bench.instruments.accuracy import ORDER_DIFFERENCE, assert_agree
from lora_fast.gated_mlps.fused_mlp import FusedMLP


def test_the_class_keeps_its_name_and_is_given_back() -> None:
    stock = stock_model()
    fused = copy.deepcopy(stock)
    before = dict(mlp_of(fused).__dict__)
    lora_fast.accelerate(fused)
    mlp = mlp_of(fused)
    assert isinstance(mlp, FusedMLP) and isinstance(mlp, GatedMLP)
    for name in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(mlp), name) == getattr(GatedMLP, name)
    assert repr(fused) == repr(stock)
    assert fused.state_dict().keys() == stock.state_dict().keys()
    lora_fast.decelerate(fused)
    assert type(mlp_of(fused)) is GatedMLP
    assert mlp_of(fused).__dict__ == before
    assert_equal_runs(run(fused, torch.ones(2, H)), run(stock, torch.ones(2, H)))


def test_idempotent_and_off() -> None:
    fused = lora_fast.accelerate(stock_model())
    fused(torch.ones(2, H))
    lora_fast.accelerate(fused)
    fused(torch.ones(2, H))
    assert counts(fused) == (2, {})
    lora_fast.accelerate(fused, fuse_mlp=False)
    assert type(mlp_of(fused)) is GatedMLP
    assert reported(fused).obstacle == "not accelerated"
    fused(torch.ones(2, H))
    assert counted(fused) == (9, {})
    with pytest.raises(TypeError, match="fuse_mlp must be a bool, got int"):
        lora_fast.accelerate(fused, fuse_mlp=1)


@pytest.mark.parametrize("shape", [(1, H), (1, 1, H), (H,)], ids=str)
def test_one_row_on_a_cpu_goes_through_the_layers(shape: tuple[int, ...]) -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    agree(fused, stock, torch.randn(shape))
    assert counts(fused) == (0, {}) and counted(fused) == (3, {})
    agree(fused, stock, torch.randn(2, H))
    assert counts(fused) == (1, {})


def test_an_adapter_that_is_added_later() -> None:
    stock = stock_model(target_modules=["q_proj"], mlp=Attention())
    fused = accelerated_copy(stock)
    for model in (stock, fused):
        torch.manual_seed(5)
        model.add_adapter("later", lora_config(target_modules=list(NAMES)))
        model.set_adapter("later")
        model.eval()
    agree(fused, stock)
    assert counts(fused) == (1, {})


class Attention(GatedMLP):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(H, H)


def hooked(name: str, register: str, hook: Any) -> Any:
    return lambda model: getattr(layer_of(model, name), register)(hook)


def set_hook_of_activation(model: Any) -> None:
    mlp_of(model).act_fn.register_forward_hook(lambda module, args, y: y * 2)


def replace_layer_forward(model: Any) -> None:
    layer = layer_of(model, "gate_proj")
    forward = type(layer).forward
    layer.forward = lambda x: forward(layer, x) * 2


def compile_layer(model: Any) -> None:
    layer_of(model, "up_proj")._compiled_call_impl = partial(
        type(layer_of(model, "up_proj")).forward, layer_of(model, "up_proj")
    )


def two_adapters(model: Any) -> None:
    torch.manual_seed(5)
    model.add_adapter("other", lora_config(target_modules=r".*_proj"))
    model.base_model.set_adapter(["default", "other"])
    model.eval()


def merge_one(model: Any) -> None:
    quietly(layer_of(model, "down_proj").merge)


def change_activation(model: Any) -> None:
    mlp_of(model).act_fn = nn.Tanh()


def replace_forward_of_activation(model: Any) -> None:
    mlp_of(model).act_fn.forward = lambda x: x * 3


def tensor_scaling(model: Any) -> None:
    layer = layer_of(model, "up_proj")
    layer.scaling["default"] = torch.tensor(layer.scaling["default"])


def nothing(model: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked("gate_proj", "register_forward_hook", lambda m, a, y: y * 2), "gate_proj: hooks"),
        (
            hooked("up_proj", "register_forward_pre_hook", lambda m, a: (a[0] * 2,)),
            "up_proj: hooks",
        ),
        (hooked("down_proj", "register_forward_hook", lambda m, a, y: y * 2), "down_proj: hooks"),
        (
            hooked("down_proj", "register_full_backward_hook", lambda m, i, o: (i[0] * 2,)),
            "down_proj: hooks",
        ),
        (set_hook_of_activation, "hooks on SiLU"),
        (replace_layer_forward, "gate_proj: forward replaced"),
        (compile_layer, "up_proj: compiled by itself"),
        (merge_one, "down_proj: merged"),
        (change_activation, "calls tanh"),
        (replace_forward_of_activation, "multiplies by a value"),
        (lambda model: model.base_model.disable_adapter_layers(), "gate_proj: adapters disabled"),
        (lambda model: quietly(model.merge_adapter), "gate_proj: merged"),
        (two_adapters, None),
        (tensor_scaling, None),
        (nothing, None),
    ],
)
def test_what_is_done_later(change: Any, reason: str | None) -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    fused(torch.ones(2, H))
    for model in (fused, stock):
        change(model)
    ours, theirs = (run(model, torch.linspace(-1, 1, 3 * H).view(3, H)) for model in (fused, stock))
    for name, expected in theirs.items():
        if expected is None:  # merged
            assert ours[name] is None
            continue
        assert_agree(ours[name], expected, within=ORDER_DIFFERENCE, name=name)
    called, others = counts(fused)
    if reason is None:
        assert (called, others) == (2, {})
        assert reported(fused).fused
    else:
        ((found, number),) = others.items()
        assert reason in found
        assert (called, number) == (1, 1)
        assert reason in str(reported(fused).obstacle)


def test_a_forward_that_is_replaced_is_theirs() -> None:
    fused = lora_fast.accelerate(stock_model())
    mlp = mlp_of(fused)
    mlp.forward = MethodType(lambda self, x: x * 7, mlp)
    assert torch.equal(fused(torch.ones(2, H)), torch.full((2, H), 7.0))
    assert reported(fused).obstacle == "forward of the module replaced"
    theirs = mlp.forward
    lora_fast.decelerate(fused)
    assert mlp.forward is theirs


def test_a_forward_of_the_class_that_is_replaced_is_theirs() -> None:
    class Own(GatedMLP):
        pass

    fused = lora_fast.accelerate(stock_model(mlp=Own()))
    Own.forward = lambda self, x: x * 7  # type: ignore[method-assign]
    assert torch.equal(fused(torch.ones(2, H)), torch.full((2, H), 7.0))
    assert counts(fused)[0] == 0


def test_hooks_of_the_mlp_run() -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    for model in (stock, fused):
        mlp_of(model).register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        mlp_of(model).register_forward_hook(lambda module, args, y: y * 3)
        mlp_of(model).register_full_backward_hook(lambda module, dx, dy: (dx[0] * 5,))
    agree(fused, stock)
    assert counts(fused) == (1, {})


def test_another_number_of_arguments_is_for_its_own_forward() -> None:
    fused = lora_fast.accelerate(stock_model())
    y = mlp_of(fused)(x=torch.ones(2, H))
    assert counts(fused) == (0, {"extra arguments": 1})
    assert_agree(mlp_of(fused)(torch.ones(2, H)), y, within=ORDER_DIFFERENCE)
    with pytest.raises(TypeError):
        mlp_of(fused)()


def test_a_mixed_batch() -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    for model in (stock, fused):
        torch.manual_seed(5)
        model.add_adapter("other", lora_config(target_modules=r".*_proj"))
        model.eval()
    x = torch.randn(2, 3, H)
    names = ["default", "other"]
    assert_agree(
        fused(x, adapter_names=names), stock(x, adapter_names=names), within=ORDER_DIFFERENCE
    )
    assert counts(fused) == (1, {})
    assert counted(fused) == (3, {})


def test_an_adapter_is_switched_and_reinitialised() -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    for model in (stock, fused):
        torch.manual_seed(5)
        model.add_adapter("other", lora_config(r=3, target_modules=list(NAMES[:2])))
        model.set_adapter("other")
        model.eval()
    agree(fused, stock)
    for model in (stock, fused):
        model.set_adapter("default")
        model.delete_adapter("other")
    agree(fused, stock)
    for model in (stock, fused):
        mlp_of(model)._modules["up_proj"].lora_A["default"] = nn.Linear(H, 5, bias=False)
        torch.manual_seed(9)
        nn.init.normal_(layer_of(model, "up_proj").lora_A["default"].weight)
    agree(fused, stock)
    assert counts(fused) == (3, {})


def test_gate_and_up_are_one_layer_twice() -> None:
    stock = stock_model()
    mlp_of(stock).up_proj = mlp_of(stock).gate_proj
    fused = accelerated_copy(stock)
    assert layer_of(fused, "up_proj") is layer_of(fused, "gate_proj")
    agree(fused, stock)
    assert counts(fused) == (1, {})


@pytest.mark.parametrize("name", NAMES)
def test_another_module_takes_the_place_of_a_layer(name: str) -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    agree(fused, stock)
    for model in (stock, fused):
        mlp_of(model)._modules[name] = nn.Sequential(layer_of(model, name))
    agree(fused, stock)
    assert reported(fused).alone == {name: "Sequential is no layer of the operation"}
    assert counts(fused) == (2, {})
    for model in (stock, fused):
        mlp_of(model)._modules[name] = None
        with pytest.raises(TypeError, match="not callable"):
            model(torch.ones(2, H))
    assert reported(fused).obstacle == f"{name}: missing"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_scaling_that_is_not_finite_raises(name: str, value: float) -> None:
    fused = lora_fast.accelerate(stock_model())
    layer_of(fused, name).scaling["default"] = value
    with pytest.raises(ValueError, match="scaling must be finite"):
        fused(torch.ones(2, H))


def test_a_parameter_is_written_through_data() -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    agree(fused, stock)
    for model in (stock, fused):
        layer = layer_of(model, "up_proj")
        layer.base_layer.weight.data.mul_(2.0)
        layer.lora_B["default"].weight.data = torch.ones_like(layer.lora_B["default"].weight)
    agree(fused, stock)
    assert counts(fused) == (2, {})


def test_the_first_call_of_4_bit_layers_returns_the_dtype_of_others() -> None:
    """Also where PEFT was not told that the model is in 4 bits, and wraps them as any layer."""
    mlp = quantised(GatedMLP().bfloat16())
    model = get_peft_model(Model(mlp), lora_config(target_modules=r".*_proj"))
    fused, x = accelerated_copy(model), torch.ones(5, H, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.float16):
        assert model(x).dtype is fused(x).dtype is fused(x).dtype


def test_the_model_is_cast() -> None:
    stock = stock_model().bfloat16()
    fused = accelerated_copy(stock)
    fused(torch.ones(2, H, dtype=torch.bfloat16))
    agree(fused.float(), stock.float())
    assert counts(fused) == (2, {})
    fused.double()(torch.ones(2, H, dtype=torch.float64))
    assert counts(fused)[0] == 2
