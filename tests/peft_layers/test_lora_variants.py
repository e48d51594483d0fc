"""Variants of LoRA that are a switch of the equation: MiCA (B frozen), aLoRA (rows of S), KaSA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lora_models import (
    HAS_MICA,
    MICA,
    K,
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
from opaque_bases import opaque_model
from peft.tuners.lora import config as lora
from peft.tuners.lora import variants
from torch import Tensor

import lora_fast
from bench.instruments.accuracy import assert_all_accurate, assert_same_bits, orders

ALORA = {"alora_invocation_tokens": [1]}
SAMPLES, ROWS = 3, 7
needs_alora = pytest.mark.skipif(
    not hasattr(variants, "ALoraLinearVariant"), reason="PEFT has no aLoRA"
)

needs_kasa = pytest.mark.skipif(
    not hasattr(variants, "KasaLinearVariant"), reason="PEFT has no KaSA"
)


@pytest.mark.skipif(not HAS_MICA, reason="PEFT has no MiCA")
def test_mica_trains_A_alone() -> None:
    stock = peft_model(**MICA).train()
    fused = accelerated_copy(stock)
    compare(fused, stock, torch.randn(4, 5, K), compute_dtype=torch.float32)
    trained = [name for name, p in fused.named_parameters() if p.requires_grad]
    assert len(trained) == 1 and "lora_A" in trained[0]
    assert counted(fused) == (1, {})


@needs_alora
@pytest.mark.parametrize("offsets", [None, [2, None, 99]], ids=str)
@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_alora_adapts_the_last_rows_of_a_sample(
    kind: str, offsets: list[int | None] | None
) -> None:
    stock = peft_model(**ALORA) if kind == "dense" else opaque_model(kind, **ALORA)
    fused, x = accelerated_copy(stock), torch.randn(SAMPLES, ROWS, K)
    plain = peft_model() if kind == "dense" else opaque_model(kind)
    plain.load_state_dict(stock.state_dict())
    weights = torch.zeros(SAMPLES, ROWS, 1)
    for weight, offset in zip(weights, offsets or [0] * SAMPLES, strict=True):
        weight[max(0, ROWS - (offset or 0)) :] = 1

    def of_rows(model: Any, x: Tensor) -> dict[str, Tensor | None]:
        """Rows with an adapter from `model`, the others from its base alone."""
        return run(Rows(model, weights), x)

    actual = run(fused, x, alora_offsets=offsets)
    assert counted(fused) == (1, {})
    ours = {name if name in ("y", "x") else f"model.{name}": t for name, t in actual.items()}
    eager = orders(lambda: of_rows(plain, x))
    if kind == "dense":
        ref64 = of_rows(copy.deepcopy(plain).double(), x.double())
        assert_all_accurate(ours, ref64, eager, compute_dtype=torch.float32)
    for name, values in eager.items():  # of int8 there is no float64
        torch.testing.assert_close(ours[name], values[0])
    base = run(fused, x)["y"]
    with stock.disable_adapter():
        assert base is not None
        assert_same_bits(base, stock(x).detach(), name="without offsets the base's output")


class Rows(torch.nn.Module):
    def __init__(self, model: Any, weights: Tensor) -> None:
        super().__init__()
        self.model, self.weights = model, weights

    def forward(self, x: Tensor) -> Tensor:
        with self.model.disable_adapter():
            base = self.model(x)
        return torch.where(self.weights.bool(), self.model(x), base)


@needs_alora
@pytest.mark.parametrize("offsets", [None, [1, 9, None, 2]], ids=str)
@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_alora_of_a_batch_of_adapters(kind: str, offsets: list[int | None] | None) -> None:
    """Each sample has its adapter, and its offset only where that is aLoRA's."""
    stock = peft_model(**ALORA) if kind == "dense" else opaque_model(kind, **ALORA)
    quietly(stock.add_adapter, "lora", lora_config(r=3))
    fused, x = accelerated_copy(stock.eval()), torch.randn(4, ROWS, K)
    names = ["default", "lora", "__base__", "default"]
    with torch.no_grad():
        found = [m(x, adapter_names=names, alora_offsets=offsets) for m in (fused, stock)]
    torch.testing.assert_close(*found)
    assert counted(fused) == (1, {})


@needs_kasa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kasa_trains_the_diagonal(dtype: torch.dtype) -> None:
    stock = kasa_model(dtype)
    fused = accelerated_copy(stock)
    compare(fused, stock, torch.randn(4, 5, K).to(dtype), compute_dtype=dtype)
    trained = {name.split(".")[-2] for name, p in fused.named_parameters() if p.requires_grad}
    assert trained == {"default", "lora_diag"} and counted(fused) == (1, {})
    for model in (fused, stock):
        quietly(model.merge_adapter)
    ours, theirs = (lora_layers(model)[0].base_layer.weight for model in (fused, stock))
    assert_same_bits(ours, theirs, name="merged by PEFT")


@needs_kasa
def test_kasa_falls_back_until_the_weight_is_truncated() -> None:
    stock = kasa_model(torch.float32)
    lora_layers(stock)[0]._lora_kasa_truncation_deferred.add("default")
    fused, x = accelerated_copy(stock), torch.randn(3, K)
    before = lora_layers(fused)[0].base_layer.weight.clone()
    assert_equal_runs(run(fused, x), run(stock, x))
    assert counted(fused) == (0, {"KaSA has yet to truncate the base weight": 1})
    assert not torch.equal(lora_layers(fused)[0].base_layer.weight, before)
    report = lora_fast.report(fused)
    assert report.layers[0].fused and not report.all_fused
    assert (
        "all_fused is False: calls fell back (1 × KaSA has yet to truncate the base weight), "
        "though the next would all run fused"
    ) in str(report)
    compare(fused, stock, x, compute_dtype=torch.float32)
    assert counted(fused)[0] == 1


def kasa_model(dtype: torch.dtype) -> Any:
    stock = peft_model(dtype=dtype, adapter_dtype=dtype, kasa_config=lora.KasaConfig())
    lora_layers(stock)[0].lora_diag["default"].data = torch.randn(5).to(dtype)
    return stock.train()
