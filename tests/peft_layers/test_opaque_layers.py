"""LoRA on bases that compute their output by themselves: PEFT's outputs and gradients, every call
fused, and fewer bytes saved for backward."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from lora_models import (
    K,
    accelerated_copy,
    assert_equal_runs,
    counted,
    lora_config,
    lora_layers,
    quietly,
    run,
)
from opaque_bases import KINDS, opaque_model
from torch import Tensor

import lora_fast
from bench.instruments.accuracy import assert_all_accurate, assert_same_bits, orders
from lora_fast.backends.torch_ops import TORCH
from lora_fast.base_layer.opaque import is_fresh
from lora_fast.operation.seeds import draw_seed

M, BF16, FP32 = 48, torch.bfloat16, torch.float32


def base_alone(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the base of a model gives and hands back for `run`'s direction of y."""
    base = copy.deepcopy(lora_layers(model)[0].base_layer)
    x = x.clone().requires_grad_()
    y = base(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (dX,) = torch.autograd.grad(y, x, direction.to(y.dtype))
    return y.detach(), dX


def plain(model: Any, x: Tensor, keeps: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """What `run` gives for a model whose adapters drop x by `keeps`, the low rank in `dtype`."""
    y, dX = base_alone(model, x)
    layer, out = lora_layers(model)[0], y.to(torch.promote_types(y.dtype, dtype))
    x = x.to(dtype).requires_grad_()
    factors = {}
    for name, keep in zip(layer.active_adapters, keeps, strict=True):
        pair = [getattr(layer, part)[name].weight for part in ("lora_A", "lora_B")]
        A, B = (t.detach().to(dtype).requires_grad_() for t in pair)
        factors[f"lora_A.{name}"], factors[f"lora_B.{name}"] = A, B
        out = out + (x * keep.to(dtype)) @ A.T @ B.T * layer.scaling[name]
    out = out if dtype is torch.float64 else out.to(y.dtype)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    dx, *grads = torch.autograd.grad(out, [x, *factors.values()], direction.to(out.dtype))
    named = zip(factors, grads, strict=True)
    return {
        "y": out.detach(),
        "x": dx + dX,
        **{f"base_model.model.fc.{name}.weight": grad for name, grad in named},
    }


def assert_as_plain(fused: Any, stock: Any, x: Tensor, keeps: list[Tensor]) -> None:
    torch.manual_seed(3)
    actual = run(fused, x)
    expected = run(stock, x)
    assert {k: t.dtype for k, t in actual.items() if t is not None} == {
        k: t.dtype for k, t in expected.items() if t is not None
    }
    ref64 = plain(stock, x, keeps, torch.float64)
    eager = orders(lambda: plain(stock, x, keeps, x.dtype))
    assert_all_accurate({k: actual[k] for k in ref64}, ref64, eager, compute_dtype=x.dtype)


def keeps_of(ps: list[float]) -> list[Tensor]:
    """The masks that a call after manual_seed(3) draws, scaled."""
    torch.manual_seed(3)
    found = []
    for p in ps:
        seed = draw_seed(torch.device("cpu")) if p else 0
        mask = TORCH.dropout_mask(seed, M, K, p, torch.device("cpu")) if p else torch.ones(M, K)
        found.append(mask.reshape(4, M // 4, K) / (1 - p))
    return found


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_as_stock(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, M // 4, K).to(dtype)
    for p in (0.0, 0.25):
        stock = opaque_model(kind, dtype, FP32, lora_dropout=p)
        fused = accelerated_copy(stock)
        assert_as_plain(fused, stock, x, keeps_of([p]))
        (line,) = lora_fast.report(fused).layers
        assert (line.fused, line.route, counted(fused)) == (True, "opaque base", (1, {}))
    for model in (fused, stock):
        lora_layers(model)[0].lora_B["default"].weight.data.zero_()
        model.eval()
    assert_same_bits(fused(x), stock(x), name="the base's output")


def test_adapters_of_several_and_of_each_sample() -> None:
    stock = opaque_model("int8", lora_dropout=0.0)
    quietly(stock.add_adapter, "other", lora_config(r=3, lora_alpha=9, lora_dropout=0.25))
    stock.base_model.set_adapter(["default", "other"])
    fused, x = accelerated_copy(stock), torch.randn(4, M // 4, K)
    assert_as_plain(fused.train(), stock.train(), x, keeps_of([0.0, 0.25]))
    names = ["other", "__base__", "default", "other"]
    for model in (fused, stock):
        model.eval()
    with torch.no_grad():  # PEFT's own raises for a view otherwise
        torch.testing.assert_close(fused(x, adapter_names=names), stock(x, adapter_names=names))
    assert counted(fused) == (2, {})


def test_what_cannot_be_added_falls_back() -> None:
    stock = opaque_model("int8", use_dora=True)
    fused, x = accelerated_copy(stock), torch.randn(2, K)
    assert_equal_runs(run(fused, x), run(stock, x))
    assert counted(fused) == (0, {"base layer is Linear8bitLt": 1})


def test_an_output_is_changed_only_where_nobody_else_holds_it() -> None:
    outputs: list[Tensor] = []
    for kind in ("int8", "hooks"):
        fused, x = lora_fast.accelerate(opaque_model(kind)), torch.randn(3, K)
        base = lora_layers(fused)[0].base_layer
        if kind == "hooks":
            base.register_forward_hook(lambda module, args, y: outputs.append(y))
            expected = base(x).clone()
            outputs.clear()
            fused(x)
            assert_same_bits(outputs[0], expected, name="what the hook kept")
        else:
            assert is_fresh(base)
            base.register_forward_hook(lambda module, args, y: None)
            assert not is_fresh(base)


@pytest.mark.parametrize("adapter_dtype", [BF16, FP32])
@pytest.mark.parametrize("kind", ["int8", "fp4", "gptq"])
def test_saved_bytes(kind: str, adapter_dtype: torch.dtype) -> None:
    """`pytest -s` prints them: at p > 0 at least M × K elements fewer than PEFT saves."""
    for p in (0.0, 0.1):
        stock = opaque_model(kind, BF16, adapter_dtype, lora_dropout=p)
        ours, theirs = saved_bytes(accelerated_copy(stock)), saved_bytes(stock)
        print(f"{kind}, {adapter_dtype} adapters, p = {p}: {ours} bytes, PEFT {theirs}")
        assert ours <= theirs - (M * K * adapter_dtype.itemsize if p else 0)


def saved_bytes(model: Any) -> int:
    """Bytes of all storages that are saved for backward, without parameters and buffers."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(M, K, dtype=BF16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
    assert y.requires_grad
    return sum(found.values())


def test_copies_and_stock_again() -> None:
    stock = opaque_model("int8")
    fused, x = accelerated_copy(stock), torch.randn(2, K)
    y = fused(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_same_bits(other(x), y, name="of a copy")
        assert counted(other)[0] > 0
    assert repr(fused) == repr(stock) and fused.state_dict().keys() == stock.state_dict().keys()
    lora_fast.decelerate(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]
