"""bitsandbytes' FP4 on every path of NF4: another table of 16 values, and nothing else."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from lora_models import (
    K,
    Mlp,
    accelerated_copy,
    assert_equal_runs,
    compare,
    counted,
    lora_layers,
    method_model,
    nf4_linear,
    peft_model,
    quietly,
    run,
)
from peft import get_peft_model_state_dict
from torch import Tensor, nn

import lora_fast
from bench.instruments.accuracy import assert_same_bits
from lora_fast.base_layer.linear import weight_of

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "adalora", "ia3"])
@pytest.mark.usefixtures("cpu_kind")
def test_every_method(method: str, p: float) -> None:
    dtype = FP32 if method == "ia3" or p else BF16
    stock = method_model(method, "fp4", dtype, compute_dtype=dtype, dropout=p)
    stock = stock.eval() if p else stock.train()  # masks differ from PEFT's
    fused, x = accelerated_copy(stock), torch.randn(3, 7, K, dtype=dtype)
    autocast = BF16 if dtype is BF16 else None
    compare(fused, stock, x, compute_dtype=dtype, eager_autocast=autocast)
    assert counted(fused) == (1, {})
    (line,) = lora_fast.report(fused).layers
    assert (line.base, line.route) == ("fp4", "torch")


def test_the_weight_is_that_of_the_format() -> None:
    layer: Any = nf4_linear(nn.Linear(128, 64), BF16, quant_type="fp4")
    weight = weight_of(layer)
    assert isinstance(weight, lora_fast.NF4Weight) and weight.quant_type == "fp4"
    assert_same_bits(weight.dequantize(BF16), _by_definition(weight), name="W")


def _by_definition(weight: lora_fast.NF4Weight) -> Tensor:
    """A sign and three bits that number eight magnitudes, the largest of them 12."""
    values = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
    code = torch.tensor([*values, *(0.0 - v for v in values)]) / 12.0
    packed = weight.packed.long()
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).view(-1, weight.blocksize)
    return (code[nibbles] * weight.absmax()[:, None]).view(weight.shape).to(BF16)


def test_layers_of_both_tables_share_their_input() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(K, 8), nn.Linear(K, 8)

        def forward(self, x: Tensor) -> Tensor:
            a = self.fc1(x)
            return a + self.fc2(x)

    stock = peft_model("fp4", model=Block())
    layers = lora_layers(stock)
    layers[1].base_layer = nf4_linear(nn.Linear(K, 8)).requires_grad_(False)
    fused = accelerated_copy(stock)
    compare(fused, stock, torch.randn(5, K), compute_dtype=FP32, layers=2)
    assert counted(fused) == (2, {})
    # In a graph, too, whose operators hold the table as a number.
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, K)
    found = {name.removeprefix("_orig_mod."): t for name, t in run(compiled, x).items()}
    assert_equal_runs(found, run(fused, x))


def test_merging_requantises_and_unmerging_is_exact() -> None:
    fused = accelerated_copy(peft_model("fp4", model=Mlp())).eval()
    x, layers = torch.randn(9, K), lora_layers(fused)
    before, packed = fused(x), [layer.base_layer.weight.data.clone() for layer in layers]
    quietly(fused.merge_adapter)
    assert [layer.base_layer.weight.quant_state.quant_type for layer in layers] == ["fp4"] * 2
    assert (fused(x) - before).norm() / before.norm() < 0.3
    quietly(fused.unmerge_adapter)
    for layer, old in zip(layers, packed, strict=True):
        assert torch.equal(layer.base_layer.weight.data, old)
    assert_same_bits(fused(x), before, name="unmerged")


def test_copies_and_files() -> None:
    stock = peft_model("fp4")
    fused, x = accelerated_copy(stock), torch.randn(4, K)
    y = fused(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_same_bits(other(x), y, name="of a copy")
    keys = get_peft_model_state_dict(stock).keys()
    assert get_peft_model_state_dict(fused).keys() == keys
    assert fused.state_dict().keys() == stock.state_dict().keys()
    other = accelerated_copy(peft_model("fp4"))
    state = fused.state_dict()
    other.load_state_dict({name: t for name, t in state.items() if "base_layer" not in name}, False)
    lora_layers(other)[0].base_layer.weight = lora_layers(fused)[0].base_layer.weight
    lora_layers(other)[0].base_layer.bias = lora_layers(fused)[0].base_layer.bias
    assert_same_bits(other(x), y, name="loaded")
