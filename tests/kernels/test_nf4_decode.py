"""The decode kernel against the formula written out, bit for bit."""

from __future__ import annotations

import pytest
import torch
from four_bit_formula import formula

from bench.instruments.accuracy import assert_same_bits
from lora_fast import NF4Weight
from lora_fast.nf4 import BLOCKSIZES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def decode(weight: NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    from lora_fast.kernels import nf4_decode

    return nf4_decode.decode(weight.packed, weight.quant_state, dtype)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_formula(executor, dtype, nested):
    """Every byte value in both nibbles, block sizes with and without a partial last block."""
    cases = ((64, (40, 96), "nf4"), (64, (33, 17), "fp4"), (4096, (96, 70), "nf4"))
    for blocksize, shape, kind in cases:
        weight = NF4Weight.from_dense(
            torch.randn(shape, device=executor.device),
            blocksize=blocksize,
            double_quant=nested,
            quant_type=kind,
        )
        count = min(256 * (weight.packed.numel() // 256), weight.packed.numel() - 1)
        weight.packed[:count] = torch.arange(count, device=executor.device).to(torch.uint8)
        expected = formula(weight.packed, weight.quant_state, dtype)
        assert_same_bits(decode(weight, dtype), expected, name=f"{blocksize} {shape}")


def test_one_launch(interpreter_or_gpu):
    weight = NF4Weight.from_dense(torch.randn(64, 64, device=interpreter_or_gpu.device))
    with interpreter_or_gpu.counting_launches() as names:
        decode(weight, torch.bfloat16)
    assert names == ["nf4_decode"]


@pytest.mark.interpreter
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_block_size(blocksize, nested):
    """With a last block that is partial."""
    for kind, dtypes in (("nf4", DTYPES), ("fp4", DTYPES[:1])):
        weight = NF4Weight.from_dense(
            torch.randn(91, 91), blocksize=blocksize, double_quant=nested, quant_type=kind
        )
        for dtype in dtypes:
            expected = formula(weight.packed, weight.quant_state, dtype)
            assert_same_bits(decode(weight, dtype), expected, name=f"{kind} {dtype}")


# N, K, blocksize: whole blocks in each row, several parts of a row, blocks across rows, odd rows.
AUGMENTED = [(5, 128, 64), (3, 9 * 1024, 64), (9, 72, 64), (7, 75, 64), (3, 256, 128)]


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wider_rows_hold_the_weight_and_the_factor_behind_it(executor, dtype, nested):
    """[W | 0 | s · b dᵀ ⊙ B | 0], W with the bits of the formula and Q rounded once."""
    from lora_fast.kernels import nf4_decode
    from lora_fast.kernels.tiles import NO_GAINS, Gains

    R, first_r, columns = 5, 16, 80
    for N, K, blocksize in AUGMENTED:
        weight = NF4Weight.from_dense(
            torch.randn(N, K, device=executor.device), blocksize=blocksize, double_quant=nested
        )
        expected = formula(weight.packed, weight.quant_state, dtype)
        B, b, d = (torch.randn(shape, device=executor.device) for shape in ((N, R), N, R))
        for gains, Q in ((NO_GAINS, 0.5 * B), (Gains(b, d), 0.5 * B * b.unsqueeze(1) * d)):
            with executor.counting_launches() as names:
                wide = nf4_decode.augmented(
                    weight.packed, weight.quant_state, dtype, B, 0.5,
                    gains=gains, first_r=first_r, columns=columns,
                )  # fmt: skip
            assert names == ["nf4_decode_augmented"]
            where = f"{N}x{K}/{blocksize}"
            assert wide.shape == (N, K + columns)
            assert_same_bits(wide[:, :K], expected, name=f"W {where}")
            first = K + first_r
            assert_same_bits(wide[:, first : first + R], Q.to(dtype), name=f"Q {where}")
            assert not wide[:, K:first].any() and not wide[:, first + R :].any()


def test_experts_hold_their_factor_behind_or_below_their_weight(typical_executor):
    """[E, N, K] as one matrix: the bits of its decoded rows and of s · B."""
    from lora_fast.kernels import nf4_decode

    device = typical_executor.device
    stored, B = torch.randn(3, 8, 48, device=device), torch.randn(3, 8, 5, device=device)
    weight = NF4Weight.from_dense(stored.view(24, 48), blocksize=64)
    weight.quant_state.shape = stored.shape
    packed = weight.packed, weight.quant_state, torch.bfloat16
    wide = nf4_decode.augmented(*packed, B.view(24, 5), 0.5, columns=16)
    assert wide.shape == (3, 8, 64)
    assert_same_bits(wide[..., :48], nf4_decode.decode(*packed), name="W")
    assert_same_bits(wide[..., 48:53], (0.5 * B).bfloat16(), name="Q")
    assert not wide[..., 53:].any()
    A = torch.randn(3, 5, 48, device=device)
    tall = nf4_decode.above(*packed, A)
    assert tall.shape == (3, 24, 48)
    assert_same_bits(tall[:, :8], nf4_decode.decode(*packed), name="W above")
    assert_same_bits(tall[:, 8:13], A.bfloat16(), name="A")
    assert not tall[:, 13:].any()
