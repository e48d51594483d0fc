"""LoRA on stand-ins for the bases of packages that need a GPU: PEFT's numbers, every call fused."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from lora_models import (
    K,
    accelerated_copy,
    assert_equal_runs,
    counted,
    lora_layers,
    peft_model,
    run,
)
from opaque_bases import KINDS, assert_as_stock, opaque_model, saved_bytes
from stand_ins import (
    EetqLinear,
    FP8Linear,
    PatchedLinear,
    QuantizedLinear,
    TransformerEngineLinear,
    TritonV2QuantLinear,
    WQLinear_GEMM,
)
from torch import nn

import lora_fast
from bench.instruments.accuracy import assert_same_bits
from lora_fast import peft_layers
from lora_fast.peft_layers import opaque_layers

M, BF16, FP32 = 48, torch.bfloat16, torch.float32
# name in opaque_layers.KINDS: the stand-in, and the packages that PEFT asks for
BASES: dict[str, tuple[Callable[[nn.Linear], nn.Module], tuple[str, ...]]] = {
    "GPTQLoraLinear": (TritonV2QuantLinear, ()),
    "AwqLoraLinear": (WQLinear_GEMM, ()),
    "AqlmLoraLinear": (QuantizedLinear, ()),
    "EetqLoraLinear": (EetqLinear, ("eetq",)),
    "IncLoraLinear": (PatchedLinear, ("neural_compressor",)),
    "TeLinear": (TransformerEngineLinear, ()),
    "FP8Linear": (FP8Linear, ()),
}


@pytest.fixture
def base(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kind of opaque_model, with the class that PEFT has where the package is installed."""
    name: str = request.param
    make, packages = BASES[name]
    if name == "FP8Linear":  # lora.Linear's
        monkeypatch.setitem(KINDS, name, (make, None))
        return name
    (kind,) = (kind for kind in opaque_layers.KINDS if kind.name == name)
    module = f"peft.tuners.lora.{kind.module}"
    for package in packages:
        fake: Any = ModuleType(package)
        fake.EetqLinear = EetqLinear
        monkeypatch.setitem(sys.modules, package, fake)
        monkeypatch.setattr(peft.import_utils, f"is_{kind.module}_available", lambda: True)
        # PEFT defines the class if it finds the package; both imports of it are undone.
        monkeypatch.setattr(peft.tuners.lora, kind.module, sys.modules[module], raising=False)
        monkeypatch.delitem(sys.modules, module)
    found = opaque_layers.FUSED_CLASSES
    known = {stock: ours for stock, ours in found.items() if stock.__name__ == name}
    classes = known or opaque_layers.fused_classes(kind)
    if not classes:
        pytest.skip(f"PEFT {peft.__version__} has no {name}")
    ((stock, ours),) = classes.items()
    assert importlib.import_module(module).__dict__[name] is stock
    monkeypatch.setitem(peft_layers.FUSED_CLASSES, stock, ours)
    monkeypatch.setitem(peft_layers.STOCK_CLASSES, ours, stock)
    monkeypatch.setitem(KINDS, name, (make, stock))
    return name


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("base", BASES, indirect=True)
def test_as_stock(base: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, M // 4, K).to(dtype)
    for p in (0.0, 0.25):
        stock = opaque_model(base, dtype, FP32, lora_dropout=p)
        fused = accelerated_copy(stock)
        assert_as_stock(stock, x, [p], fused)
        (line,) = lora_fast.report(fused).layers
        assert (line.fused, line.route, counted(fused)) == (True, "opaque base", (1, {}))
        ours, theirs = (saved_bytes(model, M, dtype) for model in (fused, stock))
        print(f"{base}, {dtype}, p = {p}: {ours} bytes, PEFT {theirs}")
        assert ours <= theirs - (M * K * dtype.itemsize if p else 0)
    for model in (fused, stock):
        lora_layers(model)[0].lora_B["default"].weight.data.zero_()
        model.eval()
    assert_same_bits(fused(x), stock(x), name="the base's output")
    lora_fast.decelerate(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("way", ["hook", "forward"])
def test_parts_of_a_tensor_parallel_layer(way: str, part: str) -> None:
    """A style of tensor parallelism sums or splits around a factor, by a hook or a forward."""
    stock = peft_model()
    fused = accelerated_copy(stock)
    for model in (stock, fused):
        factor = lora_layers(model)[0]._modules[part]["default"]
        if way == "hook":
            factor.register_forward_hook(lambda module, args, y: y + y)
        else:
            forward = factor.forward
            factor.forward = lambda x, forward=forward: forward(x) * 2
    x = torch.randn(5, K)
    assert_equal_runs(run(fused, x), run(stock, x))
    reason = f"hooks on {part}" if way == "hook" else f"forward of {part} replaced"
    assert counted(fused) == (0, {reason: 1})


def test_a_tensor_parallel_base_is_opaque() -> None:
    """Its hooks sum over processes; the factors are whole."""
    stock = peft_model()
    base = lora_layers(stock)[0].base_layer
    base.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    base.register_forward_hook(lambda module, args, y: y + y)
    fused = accelerated_copy(stock)
    assert_as_stock(stock, torch.randn(M, K), fused=fused)
    assert counted(fused) == (1, {})
