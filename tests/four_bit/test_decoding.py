"""Decoding against the formula written out, bit for bit, and on other devices by bitsandbytes."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnbf
import pytest
import torch
from four_bit_formula import bitsandbytes_decodes_by_it, formula
from hypothesis import assume, given
from hypothesis import strategies as st

from bench.instruments.accuracy import assert_same_bits
from lora_fast import NF4Weight
from lora_fast.features import EQUAL_ABSMAX
from lora_fast.four_bit import decoding
from lora_fast.four_bit.decoding import CODES, absmax_of, decode
from lora_fast.nf4 import BLOCKSIZES

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def decoded(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    absmax, blocksize = absmax_of(state), int(state.blocksize)
    return decode(packed, absmax, blocksize, state.quant_type, dtype, state.shape)


def is_refused(N: int, K: int, blocksize: int, nested: bool) -> bool:
    """One block, whose absmax bitsandbytes cannot quantise everywhere."""
    return nested and blocksize >= N * K and not EQUAL_ABSMAX.is_on()


def quantised(N: int, K: int, blocksize: int, nested: bool, kind: str = "nf4") -> Any:
    """Random bytes, all nibbles among them, under the constants of a random weight."""
    if is_refused(N, K, blocksize, nested):
        pytest.skip(str(EQUAL_ABSMAX.obstacle()))
    # An even number: bitsandbytes below 0.50 quantises no other on a CPU.
    packed, state = bnbf.quantize_4bit(
        torch.randn(N * K + N * K % 2),
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type=kind,
    )
    state.shape = torch.Size((N, K))
    packed = torch.randint(256, (packed.numel(),), dtype=torch.uint8)
    packed[:256] = torch.arange(256)[: packed.numel()].to(torch.uint8)
    return packed, state


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("N", "K", "blocksize"),
    [
        (40, 64, 64),  # every row begins a block
        (33, 96, 64),  # rows begin within blocks
        (5, 7, 64),  # one block, of which a part is there, and half a byte
        (91, 91, 64),  # an odd number of elements
        (96, 70, 4096),
        (1, 1, 32),
        (1025, 258, 128),  # more than a chunk, and a partial last block
    ],
)
def test_every_bit(N: int, K: int, blocksize: int, kind: str, nested: bool) -> None:
    packed, state = quantised(N, K, blocksize, nested, kind)
    for dtype in DTYPES:
        expected = formula(packed, state, dtype)
        assert_same_bits(decoded(packed, state, dtype), expected, name=str(dtype))


@given(
    N=st.integers(1, 70),
    K=st.integers(1, 200),
    blocksize=st.sampled_from(BLOCKSIZES),
    nested=st.booleans(),
)
def test_any_shape(N: int, K: int, blocksize: int, nested: bool) -> None:
    assume(not is_refused(N, K, blocksize, nested))
    weight = NF4Weight.from_dense(torch.randn(N, K), blocksize=blocksize, double_quant=nested)
    expected = formula(weight.packed, weight.quant_state, torch.float32)
    assert_same_bits(weight.dequantize(), expected, name="W")


@pytest.mark.parametrize("chunk", [1, 64, 1000, 1 << 30])
def test_any_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_CHUNK", chunk)
    packed, state = quantised(33, 35, 64, True)
    expected = formula(packed, state, torch.bfloat16)
    assert_same_bits(decoded(packed, state, torch.bfloat16), expected, name="W")


def test_nothing_of_bitsandbytes_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels differ between CPUs, and not all of them are right."""
    packed, state = quantised(33, 96, 64, True)
    for name in ("dequantize_4bit", "dequantize_blockwise", "dequantize_nf4"):
        monkeypatch.setattr(bnbf, name, None)
    monkeypatch.setattr(torch.ops.bitsandbytes, "dequantize_4bit", None)
    monkeypatch.setattr(torch.ops.bitsandbytes, "dequantize_blockwise", None)
    weight = NF4Weight(packed, state)
    assert_same_bits(weight.dequantize(), formula(packed, state, state.dtype), name="W")
    assert weight.absmax().shape == state.absmax.shape


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_yardstick_of_other_tests_decodes_by_the_formula(dtype: torch.dtype) -> None:
    """What stock models with the layers of lora_models are made of, on every CPU."""
    bitsandbytes_decodes_by_it()
    packed, state = quantised(33, 96, 64, True)
    state.dtype = dtype
    found = bnbf.dequantize_4bit(packed.view(-1, 1), state)
    assert_same_bits(found, formula(packed, state, dtype), name="W")


@pytest.mark.parametrize("kind", CODES)
def test_the_codes_are_those_of_the_format(kind: str) -> None:
    expected = bnbf.get_4bit_type(kind, device="cpu")
    assert torch.equal(torch.tensor(CODES[kind]), expected)


def test_under_another_default_device_and_in_inference_mode() -> None:
    """The table is made once, whoever asks first."""
    packed, state = quantised(4, 32, 32, True)
    decoding._pairs.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        first = decoded(packed, state, torch.float32)
    assert_same_bits(first, formula(packed, state, torch.float32), name="W")
    assert_same_bits(decoded(packed, state, torch.float32), first.clone(), name="W")
