"""Replacing the weight of a frozen layer, and putting the old one back."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_same_bits
from lora_models import nf4_linear
from torch import Tensor, nn

from lora_fast import NF4Weight
from lora_fast.merging import add_to_weight, restore_weight

K, N = 48, 32


def _delta() -> Tensor:
    return torch.randn(N, K) / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_is_rounded_once_and_comes_back(dtype: torch.dtype) -> None:
    base = nn.Linear(K, N).to(dtype)
    weight, before, delta = base.weight, base.weight.detach().clone(), _delta()
    old = add_to_weight(base, delta)
    assert old is weight
    assert_same_bits(old.detach(), before, name="old weight")
    assert_same_bits(base.weight.detach(), (before.float() + delta).to(dtype), name="merged")
    assert not base.weight.requires_grad
    restore_weight(base, old)
    assert base.weight is weight


@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_nf4_keeps_its_format(blocksize: int, nested: bool, storage: torch.dtype) -> None:
    base = nf4_linear(
        nn.Linear(K, N).bfloat16(),
        torch.bfloat16,
        compress_statistics=nested,
        quant_storage=storage,
    )
    if blocksize != 64:
        base.weight = _requantised(base.weight, blocksize)
    weight, packed, delta = base.weight, base.weight.data.view(torch.uint8).clone(), _delta()
    wide = NF4Weight.from_params4bit(weight).dequantize(torch.float32)
    old = add_to_weight(base, delta)
    assert old is weight and torch.equal(old.data.view(torch.uint8), packed)

    state, expected = base.weight.quant_state, weight.quant_state
    assert base.quant_state is state
    assert (state.blocksize, state.nested, state.dtype, state.quant_type, state.shape) == (
        blocksize,
        nested,
        expected.dtype,
        "nf4",
        expected.shape,
    )
    assert (base.weight.dtype, base.weight.shape) == (storage, weight.shape)
    merged = NF4Weight.from_params4bit(base.weight).dequantize(torch.float32)
    absmax = NF4Weight.from_params4bit(base.weight).absmax().max()
    # The widest gap between neighbouring NF4 codes is 0.304 of the block's absmax.
    assert (merged - (wide + delta)).abs().max() <= 0.16 * absmax
    assert (merged - wide).norm() > 0.5 * delta.norm()

    restore_weight(base, old)
    assert base.weight is weight and base.quant_state is expected


def _requantised(weight: torch.nn.Parameter, blocksize: int) -> torch.nn.Parameter:
    dense = NF4Weight.from_params4bit(weight).dequantize(torch.bfloat16)
    return type(weight)(
        dense,
        quant_type="nf4",
        blocksize=blocksize,
        compress_statistics=weight.compress_statistics,
        quant_storage=weight.quant_storage,
    ).to("cpu")


def test_tied_weights_are_not_touched() -> None:
    base, tied = nn.Linear(K, N), nn.Linear(K, N)
    tied.weight = base.weight
    before = tied.weight.detach().clone()
    restore_weight(base, add_to_weight(base, _delta()))
    assert tied.weight is base.weight
    assert_same_bits(tied.weight.detach(), before, name="tied")


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_not_finite_is_refused(kind: str) -> None:
    base = nn.Linear(K, N)
    base = nf4_linear(base) if kind == "nf4" else base
    weight, delta = base.weight, _delta()
    delta[3, 4] = float("nan")
    with pytest.raises(ValueError, match="merged weight must be finite"):
        add_to_weight(base, delta)
    assert base.weight is weight


def test_overflow_of_the_weights_dtype_is_refused() -> None:
    base = nn.Linear(K, N).half()
    with pytest.raises(ValueError, match="merged weight must be finite"):
        add_to_weight(base, _delta() * 1e7)
