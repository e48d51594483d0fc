"""The dropout mask: its generator, its share, its tiles, and pairs of elements against the mask."""

from __future__ import annotations

import pytest
import torch

from bench.instruments.accuracy import assert_same_bits

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from lora_fast.kernels import dropout as kernels  # noqa: E402
from lora_fast.kernels.dropout import Dropout, dropout_mask  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WORD = 0xFFFFFFFF


def philox(counter: tuple[int, ...], key: tuple[int, int], rounds: int) -> tuple[int, ...]:
    """Philox4x32 of Salmon et al., word by word."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & WORD, (a >> 32) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "rounds", "words"),
    [
        ((0, 0, 0, 0), (0, 0), 7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((WORD,) * 4, (WORD,) * 2, 7, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        ((0, 0, 0, 0), (0, 0), 10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_the_generator_here_gives_the_published_answers(counter, key, rounds, words):
    """Those of Random123's known-answer tests."""
    assert philox(counter, key, rounds) == words


def test_the_mask_is_made_of_philox(executor):
    seed, p = (0xDEADBEEF << 32) | 0x89ABCDEF, 0.25
    M, K = 5, 24
    mask = dropout_mask(M, K, Dropout(p, seed), executor.device).cpu()
    for m in range(M):
        for k in range(K):
            words = philox((m, k // 8, 0, 0), (seed & WORD, seed >> 32), 7)
            bits = (words[k % 8 // 2] >> (16 * (k % 2))) & 0x7FFF
            assert bool(mask[m, k]) == (bits >= 0x7FFF * p), (m, k)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_for(interpreter_or_gpu, p):
    """Of the mask that `test_the_mask_is_made_of_philox` has on every machine."""
    mask = dropout_mask(64, 1024, Dropout(p, 3), interpreter_or_gpu.device).cpu().double()
    spread = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 4 * spread / mask.numel() ** 0.5
    for one, other in ((mask[:, ::2], mask[:, 1::2]), (mask[::2], mask[1::2])):
        correlation = ((one - one.mean()) * (other - other.mean())).mean() / spread**2
        assert abs(correlation) < 4 / one.numel() ** 0.5
    other = dropout_mask(64, 1024, Dropout(p, 4), interpreter_or_gpu.device)
    assert not mask.equal(other.cpu().double())


@pytest.mark.parametrize(
    ("p", "dropped", "scale"),
    [
        (0.0, 0, 1.0),
        (0.25, 8192, 4 / 3),
        (0.1, 3277, 32768 / 29491),
        (1e-9, 1, 32768 / 32767),
        (1 - 1e-9, 32767, 32768.0),
        (1.0, 32768, 0.0),
    ],
)
def test_what_is_kept_is_scaled_by_the_p_that_is_drawn(p, dropped, scale):
    drawn = Dropout(p, 1)
    assert drawn.dropped == dropped
    assert drawn.keep_scale == pytest.approx(scale)
    assert drawn.words()[-1] == dropped


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])
def _drop(
    x_ptr, y_ptr, seed_ptr, seed_low, seed_high, threshold, M, K,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = tl.program_id(1) * BLOCK_K
    offs_k = first_k + tl.arange(0, BLOCK_K)
    offs = offs_m[:, None] * K + offs_k[None, :]
    inside = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    x = tl.load(x_ptr + offs, mask=inside, other=0.0)
    words = kernels.Words(seed_ptr, seed_low, seed_high, threshold)
    y = kernels.drop(x, words, kernels.seed_of(words), offs_m, first_k, BLOCK_K, PAIRS)
    tl.store(y_ptr + offs, y, mask=inside)


@pytest.mark.parametrize("p", [0.1, 1.0])
@pytest.mark.parametrize(("dtype", "blocks"), [(BF16, (16, 64)), (FP16, (64, 16)), (FP32, (8, 32))])
def test_a_dropped_tile_is_the_tile_where_the_mask_keeps_it(executor, dtype, blocks, p):
    """In tiles of any size; two elements at once where there is machine code for it."""
    M, K, drop = 40, 72, Dropout(p, 5)
    x = torch.randn(M, K).to(dtype).to(executor.device)
    y = torch.empty_like(x)
    pairs = kernels.drops_pairs(dtype, executor.arch)
    grid = (triton.cdiv(M, blocks[0]), triton.cdiv(K, blocks[1]))
    _drop[grid](x, y, *drop.words(), M, K, BLOCK_M=blocks[0], BLOCK_K=blocks[1], PAIRS=pairs)
    mask = dropout_mask(M, K, drop, executor.device)
    assert mask.any() == (p < 1.0)
    assert_same_bits(y, torch.where(mask, x, 0.0), name="drop(x)")
