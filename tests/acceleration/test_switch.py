"""accelerate and decelerate on whole PEFT models: changes, invariants and training."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from lora_models import (
    K,
    Mlp,
    N,
    Single,
    accelerated_copy,
    assert_equal_runs,
    compare,
    counted,
    lora_config,
    lora_layers,
    peft_model,
    quietly,
    run,
)
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners import lora
from peft.tuners.lora.bnb import Linear4bit
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fast
from bench.instruments.accuracy import RUN_DIFFERENCE, assert_agree
from lora_fast import peft_layers
from lora_fast.acceleration import switch
from lora_fast.four_bit.layout import forbid_packing

F32, BF16 = torch.float32, torch.bfloat16
KINDS = ["dense", "nf4"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_class_changes(kind: str) -> None:
    model = peft_model(kind, model=Mlp())
    before, text, keys = copy.deepcopy(model.state_dict()), repr(model), list(model.state_dict())
    (layer, _) = lora_layers(model)
    attributes, of_tuner = set(vars(layer)), set(vars(model.base_model))

    assert lora_fast.accelerate(model) is model
    assert type(layer) in peft_layers.STOCK_CLASSES
    assert isinstance(layer, lora.Linear if kind == "dense" else Linear4bit)
    assert isinstance(layer, lora.LoraLayer)
    assert repr(model) == text
    assert list(model.state_dict()) == keys

    assert lora_fast.decelerate(model) is model
    assert [type(layer) for layer in lora_layers(model)] == [
        lora.Linear if kind == "dense" else Linear4bit
    ] * 2
    assert type(model.base_model) is lora.LoraModel
    assert (set(vars(layer)), set(vars(model.base_model))) == (attributes, of_tuner)
    assert_equal_runs(dict(model.state_dict()), dict(before))


def test_twice_is_once_and_counts_stay() -> None:
    model = lora_fast.accelerate(peft_model(model=Mlp()))
    model(torch.randn(2, K))
    classes = [type(layer) for layer in lora_layers(model)]
    lora_fast.accelerate(model, group_shared_inputs=False)
    assert [type(layer) for layer in lora_layers(model)] == classes
    assert counted(model) == (2, {})
    assert lora_fast.decelerate(lora_fast.decelerate(model)) is model


def test_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Incompatible(lora.Linear):
        __slots__ = ("another_layout",)

    model = peft_model(model=Mlp())
    (first, second) = lora_layers(model)
    other = type("OtherLinear", (lora.Linear,), {})
    second.__class__ = other
    monkeypatch.setitem(peft_layers.FUSED_CLASSES, other, Incompatible)
    with pytest.raises(TypeError, match="layout"):
        lora_fast.accelerate(model)
    assert (type(first), type(second)) == (lora.Linear, other)
    assert not hasattr(first, "_lora_fast_calls")


def test_subclasses_from_elsewhere_are_left_alone() -> None:
    model = peft_model(model=Mlp())
    (first, _) = lora_layers(model)
    first.__class__ = type("TorchaoLoraLinear", (lora.Linear,), {})
    lora_fast.accelerate(model)
    assert type(first).__name__ == "TorchaoLoraLinear"
    model(torch.randn(2, K))
    assert counted(model) == (1, {})


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2)), ValueError, "model must contain adapted layers"),
        ("model", TypeError, "model must be a torch.nn.Module, got str"),
    ],
)
def test_wrong_models(argument: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lora_fast.accelerate(argument)
    if error is TypeError:
        for function in (lora_fast.decelerate, lora_fast.report):
            with pytest.raises(error, match=message):
                function(argument)
    else:
        assert lora_fast.decelerate(argument) is argument


def test_wrong_flag() -> None:
    with pytest.raises(TypeError, match="group_shared_inputs must be a bool, got int"):
        lora_fast.accelerate(peft_model(), group_shared_inputs=1)


def test_a_replaced_forward_of_the_layer_is_kept() -> None:
    """An instance's own forward would hide a new class."""
    model = peft_model()
    (layer,) = lora_layers(model)
    layer.forward = lambda x: x.new_zeros(())
    lora_fast.accelerate(model)
    assert type(layer) is lora.Linear
    assert model(torch.randn(2, K)).shape == ()
    assert lora_fast.report(model).layers[0].obstacle == "forward of the layer replaced"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_device_map_hooks_of_the_base_model_do_not_matter(kind: str, when: str) -> None:
    """transformers' device_map hooks every module of a model that spans several devices."""
    stock = peft_model(kind, model=Mlp())
    fused = copy.deepcopy(stock)
    if when == "before":
        dispatch_model(fused, {"": "cpu"}, force_hooks=True)
    lora_fast.accelerate(fused)
    if when == "after":
        dispatch_model(fused, {"": "cpu"}, force_hooks=True)
    layer = lora_layers(fused)[0]
    assert "forward" in vars(layer) and "forward" in vars(layer.base_layer)
    x = torch.randn(9, K)
    assert lora_fast.report(fused).all_fused
    compare(fused, stock, x, compute_dtype=F32)
    assert counted(fused) == (2, {})

    remove_hook_from_submodules(fused)
    compare(fused, stock, x, compute_dtype=F32)
    assert counted(fused) == (4, {})
    lora_fast.decelerate(fused)
    assert_equal_runs(run(fused, x), run(stock, x))
    assert counted(fused) == (0, {})


def test_offloading_hooks_run_as_they_are() -> None:
    stock = peft_model()
    fused = accelerated_copy(stock)
    add_hook_to_module(lora_layers(fused)[0].base_layer, AlignDevicesHook("cpu", offload=True))
    x = torch.randn(9, K)
    compare(fused, stock, x, compute_dtype=torch.float32)
    assert counted(fused) == (1, {})


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_pickle_and_state_dict(kind: str) -> None:
    model = accelerated_copy(peft_model(kind, model=Mlp()))
    x = torch.randn(5, K)
    expected = run(model, x)

    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for clone in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ):
        assert_equal_runs(run(clone, x), expected)
        assert counted(clone) == (4, {})

    other = accelerated_copy(peft_model(kind, model=Mlp()))
    assert not torch.equal(run(other, x)["y"], expected["y"])
    if kind == "dense":
        other.load_state_dict(model.state_dict())
        assert_equal_runs(run(other, x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_files_load_in_stock_peft(kind: str, tmp_path: Path) -> None:
    base = Mlp()
    model = accelerated_copy(peft_model(kind, model=copy.deepcopy(base)))
    quietly(model.save_pretrained, tmp_path)
    fresh = lora_fast.decelerate(copy.deepcopy(model)).unload()
    forbid_packing(fresh)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    x = torch.randn(5, K)
    assert_agree(loaded(x), model(x), within=RUN_DIFFERENCE)
    lora_fast.accelerate(loaded)
    assert torch.equal(loaded(x), model(x))
    assert get_peft_model_state_dict(loaded).keys() == get_peft_model_state_dict(model).keys()


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_to_dtype(dtype: torch.dtype) -> None:
    stock = peft_model().to(dtype)
    fused = accelerated_copy(peft_model().to(F32))
    fused.load_state_dict(stock.state_dict())
    fused.to(dtype)
    compare(fused, stock, torch.randn(9, K, dtype=dtype), compute_dtype=dtype)
    assert counted(fused) == (1, {})


def _lower_rank(model: Any) -> None:
    model.add_adapter("other", lora_config(r=2, lora_alpha=3))
    model.set_adapter("other")


def _both(r: int, alpha: float, dtype: torch.dtype = F32) -> Callable[[Any], None]:
    def activate(model: Any) -> None:
        model.add_adapter("other", lora_config(r=r, lora_alpha=alpha))
        scalings = lora_layers(model)[0].scaling
        assert (scalings["default"] == scalings["other"]) == (r == 10)
        lora_layers(model)[0].lora_A["other"].to(dtype)
        lora_layers(model)[0].lora_B["other"].to(dtype)
        model.base_model.set_adapter(["default", "other"])

    return activate


def _back_and_delete(model: Any) -> None:
    _lower_rank(model)
    model.set_adapter("default")
    model.delete_adapter("other")


def _merge_and_unmerge(model: Any) -> None:
    quietly(model.merge_adapter)
    quietly(model.unmerge_adapter)


def _disable_and_enable(model: Any) -> None:
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()


def _tensor_scaling(model: Any) -> None:
    prepare_model_for_compiled_hotswap(model, target_rank=9)
    assert isinstance(lora_layers(model)[0].scaling["default"], Tensor)
    assert lora_layers(model)[0].lora_A["default"].weight.shape[0] == 9


def _scale(model: Any) -> None:
    lora_layers(model)[0].scale_layer(0.3)


def _replace_modules(model: Any) -> None:
    (layer,) = lora_layers(model)
    layer.lora_A["default"] = nn.Linear(K, 11, bias=False)
    layer.lora_B["default"] = nn.Linear(11, N, bias=False)


CHANGES = {
    "switch to another adapter": _lower_rank,
    "two adapters, one scaling": _both(10, 16),
    "two adapters, two scalings": _both(3, 1.0),
    "two adapters, two dtypes": _both(3, 1.0, BF16),
    "switch back and delete": _back_and_delete,
    "merge and unmerge": _merge_and_unmerge,
    "disable and enable": _disable_and_enable,
    "padded rank, scaling a tensor": _tensor_scaling,
    "scale_layer": _scale,
    "other modules": _replace_modules,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_after_accelerate_are_followed(change: Callable[[Any], None]) -> None:
    """Run, change the adapters, run again: no state of the first run may remain."""
    stock = peft_model()
    fused = accelerated_copy(stock)
    x = torch.randn(9, K)
    run(fused, x)
    for model in (stock, fused):
        torch.manual_seed(7)
        change(model)
    compute = BF16 if "bfloat16" in str([p.dtype for p in fused.parameters()]) else F32
    compare(fused, stock, x, compute_dtype=compute)
    assert counted(fused) == (2, {})


def test_changes_of_nf4_layers() -> None:
    stock = peft_model("nf4")
    fused = accelerated_copy(stock)
    x = torch.randn(9, K)
    for change in (_both(3, 1.0), lambda model: model.set_adapter("other")):
        for model in (stock, fused):
            torch.manual_seed(7)
            change(model)
        compare(fused, stock, x, compute_dtype=F32)
    _merge_and_unmerge(fused)
    compare(fused, stock, x, compute_dtype=F32)
    assert counted(fused) == (3, {})


@pytest.mark.parametrize("padded", [True, False])
def test_hotswap_of_another_rank(padded: bool, tmp_path: Path) -> None:
    small = peft_model(r=3, lora_alpha=5)
    small.save_pretrained(tmp_path)
    stock = peft_model(r=5, lora_alpha=8)
    fused = accelerated_copy(stock)
    x = torch.randn(9, K)
    run(fused, x)
    for model in (stock, fused):
        if padded:
            prepare_model_for_compiled_hotswap(model, target_rank=9)
        hotswap_adapter(model, tmp_path, adapter_name="default")
    ranks = [lora_layers(model)[0].lora_A["default"].weight.shape[0] for model in (stock, fused)]
    # PEFT from 0.21 on keeps the rank that was there; before, it took that of the file.
    assert ranks[0] == ranks[1] and ranks[0] in (3, 9 if padded else 5)
    compare(fused, stock, x, compute_dtype=F32)
    assert counted(fused) == (2, {})


@pytest.mark.parametrize("kind", KINDS)
def test_merge_gives_the_base_that_stock_gives(kind: str) -> None:
    stock = peft_model(kind, model=Mlp())
    fused = accelerated_copy(stock)
    for model in (stock, fused):
        quietly(model.merge_adapter)
    x = torch.randn(5, K)
    torch.testing.assert_close(fused(x), stock(x))
    assert counted(fused) == (0, {"merged": 2})
    merged = [quietly(model.merge_and_unload) for model in (fused, stock)]
    assert type(merged[0].fc1) is type(merged[1].fc1)
    torch.testing.assert_close(merged[0](x), merged[1](x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_sees_the_same_dropout(reentrant: bool) -> None:
    model = accelerated_copy(peft_model(lora_dropout=0.5)).train()
    x = torch.randn(9, K)
    torch.manual_seed(2)
    expected = run(model, x)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    torch.manual_seed(2)
    actual = {k.removeprefix("inner."): t for k, t in run(Checkpointed(), x).items()}
    assert_equal_runs(actual, expected)


def test_hooks_on_the_layer_itself_run() -> None:
    fused = accelerated_copy(peft_model())
    seen: list[Any] = []
    lora_layers(fused)[0].register_forward_hook(lambda module, args, y: seen.append(y.shape))
    lora_layers(fused)[0].register_full_backward_hook(lambda module, dx, dy: seen.append(len(dx)))
    run(fused, torch.randn(3, K))
    assert seen == [(3, N), 1]
    assert counted(fused) == (1, {})


def test_no_peft_no_acceleration_of_our_own_modules() -> None:
    model = lora_fast.convert(Mlp(), ["fc1"])
    assert lora_fast.accelerate(model) is model
    assert [type(m) for m in (model.fc1, model.fc2)] == [lora_fast.LoRALinear, nn.Linear]
    assert next(switch.adapted_layers(model))[0] == "fc1"


def test_single_layer_model_without_wrapper() -> None:
    """inject_adapter_in_model leaves the model's own class on the outside."""
    from peft import inject_adapter_in_model

    model = inject_adapter_in_model(lora_config(), Single())
    lora_fast.accelerate(model)(torch.randn(2, K))
    assert counted(model) == (1, {})
    assert isinstance(get_peft_model(Single(), lora_config()), PeftModel)
