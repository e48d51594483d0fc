"""NF4 weights against their formula, bitwise, and weights that are refused."""

from __future__ import annotations

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import pytest
import torch
from four_bit_formula import formula

from bench.instruments.accuracy import assert_same_bits
from lora_fast import NF4Weight
from lora_fast.features import EQUAL_ABSMAX
from lora_fast.nf4 import BLOCKSIZES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def params4bit(weight, **kwargs):
    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, quant_type="nf4", **kwargs
    )
    layer.load_state_dict({"weight": weight})
    return layer.to("cpu").weight


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decodes_by_the_formula(dtype, nested):
    for blocksize in BLOCKSIZES:
        for shape in ((64, 64), (33, 18), (5, 7), (65, 130)):
            dense = torch.randn(shape).to(dtype)
            if nested and dense.numel() <= blocksize and not EQUAL_ABSMAX.is_on():
                continue
            weight = NF4Weight.from_dense(dense, blocksize=blocksize, double_quant=nested)
            expected = formula(weight.packed, weight.quant_state, dtype)
            assert_same_bits(weight.dequantize(), expected, name=f"{blocksize} {shape}")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_wraps_params4bit_without_a_copy(storage):
    dense = torch.randn(32, 64)
    p = params4bit(dense, quant_storage=storage)
    weight = NF4Weight.from_params4bit(p)
    assert weight.packed.data_ptr() == p.data_ptr()
    assert weight.packed.dtype == torch.uint8
    assert (weight.shape, weight.nested, weight.blocksize) == ((32, 64), True, 64)
    expected = formula(weight.packed, p.quant_state, torch.float32)
    assert_same_bits(weight.dequantize(), expected, name="W")


def test_float64_is_the_exact_image_of_float32():
    weight = NF4Weight.from_dense(torch.randn(16, 16))
    assert torch.equal(weight.dequantize(torch.float64), weight.dequantize(torch.float32).double())


def test_high_nibble_comes_first():
    dense = torch.tensor([[1.0, -1.0]]).repeat(1, 32)
    weight = NF4Weight.from_dense(dense, double_quant=False)
    assert weight.packed.tolist() == [0xF0] * 32
    assert torch.equal(weight.dequantize(), dense)


def test_a_weight_without_data_leaves_later_ones_alone(monkeypatch):
    # bitsandbytes makes its table of 8-bit values on the device of its first use, and keeps it.
    monkeypatch.setattr(bnbf, "name2qmap", {})
    W = torch.randn(64, 64)
    NF4Weight.from_dense(W.to("meta"))
    found = NF4Weight.from_dense(W)
    monkeypatch.setattr(bnbf, "name2qmap", {})
    assert_same_bits(found.packed, NF4Weight.from_dense(W).packed, name="packed")


def test_what_kills_the_process_is_refused(monkeypatch):
    """bitsandbytes below 0.49 divides by the largest distance of absmax from their mean: by 0."""
    monkeypatch.setattr("lora_fast.features.installed", lambda package: (0, 48, 2))
    one_block, equal_blocks = torch.randn(4, 8), torch.ones(64, 96)
    for dense in (one_block, equal_blocks):
        with pytest.raises(NotImplementedError, match=r"double_quant must be False .*needs bits"):
            NF4Weight.from_dense(dense)
        assert NF4Weight.from_dense(dense, double_quant=False).shape == dense.shape
    assert NF4Weight.from_dense(torch.randn(64, 96)).nested


def test_an_odd_number_of_elements_ends_in_half_a_byte():
    dense = torch.randn(7, 19)
    weight = NF4Weight.from_dense(dense, double_quant=False)
    padded = torch.nn.functional.pad(dense.view(1, -1), (0, 1))
    even = NF4Weight.from_dense(padded, double_quant=False)
    assert weight.shape == dense.shape and weight.packed.numel() == 67
    assert_same_bits(weight.packed, even.packed, name="packed")
    assert_same_bits(weight.absmax(), even.absmax(), name="absmax")


def test_other_weights_are_refused():
    dense = torch.randn(32, 64)
    with pytest.raises(TypeError, match="weight must be a quantised bitsandbytes Params4bit"):
        NF4Weight.from_params4bit(dense)
    other = bnb.nn.Linear4bit(64, 32, quant_type="fp4").to("cpu")
    other.weight.quant_state.quant_type = "int4"
    with pytest.raises(NotImplementedError, match="quantised as nf4 or fp4, got int4"):
        NF4Weight.from_params4bit(other.weight)
    with pytest.raises(ValueError, match=r"quant_type must be one of .*, got 'int4'"):
        NF4Weight.from_dense(dense, quant_type="int4")
    with pytest.raises(ValueError, match=r"weight must have shape \[N, K\]"):
        NF4Weight.from_dense(torch.randn(64))
    with pytest.raises(ValueError, match="blocksize must be one of"):
        NF4Weight.from_dense(dense, blocksize=48)
