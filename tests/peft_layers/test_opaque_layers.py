"""LoRA on bases that compute their output by themselves: PEFT's outputs and gradients, every call
fused, and fewer bytes saved for backward."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from lora_models import (
    K,
    Single,
    accelerated_copy,
    assert_equal_runs,
    counted,
    lora_config,
    lora_layers,
    method_config,
    peft_model,
    quietly,
    run,
)
from opaque_bases import KINDS, assert_as_stock, opaque_model, saved_bytes
from peft import get_peft_model
from torch import Tensor

import lora_fast
from bench.instruments.accuracy import assert_all_accurate, assert_same_bits, orders
from lora_fast.base_layer.opaque import is_fresh

M, BF16, FP32 = 48, torch.bfloat16, torch.float32


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_as_stock(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, M // 4, K).to(dtype)
    for p in (0.0, 0.25):
        stock = opaque_model(kind, dtype, FP32, lora_dropout=p)
        fused = accelerated_copy(stock)
        assert_as_stock(stock, x, [p], fused)
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
    assert_as_stock(stock.train(), x, [0.0, 0.25], fused.train())
    names = ["other", "__base__", "default", "other"]
    for model in (fused, stock):
        model.eval()
    with torch.no_grad():  # PEFT's own raises for a view otherwise
        torch.testing.assert_close(fused(x, adapter_names=names), stock(x, adapter_names=names))
    assert counted(fused) == (2, {})


@pytest.mark.parametrize("kind", ["int8", "hooks"])
@pytest.mark.parametrize("method", ["dora", "vera", "adalora", "ia3", "ia3-feedforward"])
def test_what_cannot_be_added_falls_back(method: str, kind: str) -> None:
    torch.manual_seed(0)
    model: Any = Single()
    model.fc = KINDS[kind][0](model.fc)
    model.is_loaded_in_8bit = kind == "int8"
    stock = get_peft_model(model, method_config(method), autocast_adapter_dtype=False).train()
    fused, x = accelerated_copy(stock), torch.randn(2, K)
    assert_equal_runs(run(fused, x), run(stock, x))
    (line,) = lora_fast.report(fused).layers
    assert line.obstacle is not None and not line.fused and line.fused_calls == 0
    assert re.fullmatch(
        r"base layer is Linear8bitLt|\w+\.\w*Linear8bitLt has no fused path|hooks on base layer",
        line.obstacle,
    )
    if line.counted:
        assert line.fallback_calls == {line.obstacle: 1}


def test_rslora_is_a_scaling() -> None:
    stock = opaque_model("int8", use_rslora=True)
    fused = accelerated_copy(stock)
    assert_as_stock(stock, torch.randn(M, K), fused=fused)
    assert counted(fused) == (1, {})


@pytest.mark.parametrize("kind", ["subclass", "hooks"])
def test_in_a_graph_pefts_forward_is_traced(kind: str) -> None:
    stock = opaque_model(kind)
    fused, x = accelerated_copy(stock), torch.randn(6, K)
    compiled = torch.compile(fused, backend="aot_eager")
    found = {name.removeprefix("_orig_mod."): t for name, t in run(compiled, x).items()}
    expected = run(stock, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    (line,) = lora_fast.report(fused).layers
    (reason,) = line.fallback_calls
    assert line.fused_calls == 0 and reason.startswith("torch.compile: ")
    fused(x)
    assert lora_fast.report(fused).layers[0].fused_calls == 1


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
@pytest.mark.parametrize("kind", ["int8", "subclass", "fp4"])
def test_saved_bytes(kind: str, adapter_dtype: torch.dtype) -> None:
    """`pytest -s` prints them: at p > 0 at least M × K elements fewer than PEFT saves."""
    for p in (0.0, 0.1):
        make = peft_model if kind == "fp4" else opaque_model
        stock = make(kind, BF16, adapter_dtype, lora_dropout=p).train()
        ours, theirs = saved_bytes(accelerated_copy(stock), M, BF16), saved_bytes(stock, M, BF16)
        print(f"{kind}, {adapter_dtype} adapters, p = {p}: {ours} bytes, PEFT {theirs}")
        assert ours <= theirs - (M * K * adapter_dtype.itemsize if p else 0)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_decoded_int8(dtype: torch.dtype, p: float) -> None:
    """The numbers of a dense layer with the decoded weight, in the dtypes of stock PEFT."""
    stock = opaque_model("int8", dtype, dtype, lora_dropout=p).train(p == 0)
    fused = lora_fast.accelerate(copy.deepcopy(stock), decode_int8=True)
    base = lora_layers(stock)[0].base_layer
    wide = base.weight.data.double() * base.weight.SCB.double().unsqueeze(1) / 127
    dense = peft_model(dtype=dtype, adapter_dtype=dtype, lora_dropout=p).train(p == 0)
    lora_layers(dense)[0].base_layer.bias.data.copy_(base.bias)
    lora_layers(dense)[0].base_layer.weight.data.copy_(wide)
    dense.load_state_dict(
        {n: t for n, t in stock.state_dict().items() if "lora_" in n}, strict=False
    )
    ref64 = copy.deepcopy(dense).double()
    lora_layers(ref64)[0].base_layer.weight.data.copy_(wide)
    x = torch.randn(4, M // 4, K).to(dtype)
    for autocast in (None, BF16) if dtype is FP32 and not p else (None,):
        actual = run(fused, x, autocast)
        expected = run(ref64, x.double())
        eager = orders(lambda autocast=autocast: run(dense, x, autocast))
        assert_all_accurate(actual, expected, eager, compute_dtype=autocast or dtype)
        assert actual["y"].dtype == run(stock, x, autocast)["y"].dtype
    (line,) = lora_fast.report(fused).layers
    assert (line.fused, line.route) == (True, "opaque base, decoded")
    assert counted(fused)[1] == {}
    # PEFT's base holds CB and SCB, which are no copies, beside what is saved.
    held = wide.numel() + 4 * wide.shape[0]
    assert saved_bytes(fused, M, dtype) <= saved_bytes(stock, M, dtype) + held
    # As stock again, with hooks on the base as well.
    lora_layers(fused)[0].base_layer.register_forward_hook(lambda module, args, y: y)
    assert lora_fast.report(fused).layers[0].route == "opaque base"


def test_decoding_covers_later_layers_and_is_undone() -> None:
    fused = lora_fast.accelerate(opaque_model("int8"), decode_int8=True)
    quietly(fused.add_adapter, "other", lora_config(r=3))
    assert lora_fast.report(fused).layers[0].route == "opaque base, decoded"
    lora_fast.accelerate(fused)
    assert lora_fast.report(fused).layers[0].route == "opaque base"
    with pytest.raises(TypeError, match="decode_int8 must be a bool, got int"):
        lora_fast.accelerate(fused, decode_int8=1)  # type: ignore[arg-type]


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
