"""LoRA on bases of packages that the suite does not depend on: the row `bases` of tests/matrix.py
installs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lora_models import K, Single, counted, lora_config, lora_layers, run
from opaque_bases import assert_as_stock, saved_bytes
from peft import get_peft_model
from torch import nn

import lora_fast
from bench.instruments.accuracy import assert_same_bits

hqq = pytest.importorskip("hqq.core.quantize")
torchao = pytest.importorskip("torchao.quantization")
quanto = pytest.importorskip("optimum.quanto")
compressed = pytest.importorskip("compressed_tensors.quantization")
M = 48


def in_hqq(model: Any) -> None:
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=8)
    model.fc = hqq.HQQLinear(model.fc, config, compute_dtype=torch.float32, device="cpu")


def in_torchao(model: Any) -> None:
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def in_quanto(model: Any) -> None:
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


def in_compressed_tensors(model: Any) -> None:
    weights = compressed.QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
    scheme = compressed.QuantizationScheme(targets=["Linear"], weights=weights)
    config = compressed.QuantizationConfig(config_groups={"all": scheme})
    compressed.apply_quantization_config(model, config)
    largest = model.fc.weight.detach().abs().amax(1, keepdim=True)
    model.fc.weight_scale.data.copy_(largest / 127)


@pytest.mark.parametrize("quantise", [in_hqq, in_torchao, in_quanto, in_compressed_tensors])
def test_as_stock(quantise: Callable[[nn.Module], None]) -> None:
    x = torch.randn(4, M // 4, K)
    for p in (0.0, 0.25):
        torch.manual_seed(0)
        model = Single()
        quantise(model)
        config = lora_config(lora_dropout=p)
        stock = get_peft_model(model, config, autocast_adapter_dtype=False).train()
        theirs, y = saved_bytes(stock, M, torch.float32), run(stock.eval(), x)["y"]
        # Not all of these bases can be copied.
        assert_as_stock(stock.train(), x, [p])
        report = lora_fast.report(stock)
        assert report.all_fused and counted(stock) == (1, {}), str(report)
        ours = saved_bytes(stock, M, torch.float32)
        print(f"{quantise.__name__}, p = {p}: {ours} bytes, PEFT {theirs}")
        assert ours <= theirs - (4 * M * K if p else 0)
    assert y is not None
    lora_layers(stock)[0].lora_B["default"].weight.data.zero_()
    with torch.no_grad():
        base = lora_layers(stock)[0].base_layer(x)
        assert_same_bits(stock.eval()(x), base, name="the base's output")
