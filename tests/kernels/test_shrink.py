"""S by itself, and beside a copy of x, on every machine that runs kernels."""

from __future__ import annotations

import pytest
import torch
from equation import lay_out

pytest.importorskip("triton")
from lora_fast.kernels import dropout, expand, shrink
from lora_fast.kernels.dropout import NO_DROPOUT, Dropout
from lora_fast.kernels.scaling import Shrunk

from bench.instruments.accuracy import assert_accurate, assert_same_bits, orders

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# M, K, the ranks of all layers, dtype of x and of A, p, layout of x, spans of the rank.
CASES = {
    "ragged": (37, 75, (5,), BF16, FP32, 0.0, "contiguous", ()),
    "aligned": (64, 256, (16, 16, 16), BF16, FP32, 0.3, "contiguous", ()),
    "chunks of the rank": (40, 136, (1, 70, 29), FP16, FP16, 0.0, "transposed", ()),
    "float32": (35, 72, (8, 12), FP32, FP32, 0.3125, "sliced", ()),
    "spans": (40, 128, (80,), BF16, BF16, 0.3, "contiguous", ((0, 16), (64, 80), (0, 0), (16, 64))),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_S_and_the_copy_of_x(executor, case):
    M, K, ranks, dtype, adapter, p, layout, spans = case
    R = sum(ranks)
    device = executor.device
    drops = Dropout(p, 11) if p else NO_DROPOUT
    x = lay_out(torch.randn(M, K).to(dtype).to(device), layout)
    A = torch.randn(R, K).to(adapter).to(device)
    # Each in memory of its own, in another order than that of their ranks.
    factors = [part.clone() for part in reversed(A.split(ranks))][::-1]
    rank_spans = torch.tensor(spans, dtype=torch.int32, device=device) if spans else None
    mask = torch.ones(M, K)
    if p:
        mask = dropout.dropout_mask(M, K, drops, device).cpu() * drops.keep_scale
    used = torch.ones(M, R)
    for sample, (start, stop) in enumerate(spans):
        rows = slice(sample * M // len(spans), (sample + 1) * M // len(spans))
        used[rows, :start], used[rows, stop:] = 0.0, 0.0

    def plain(of):
        return (of(x.cpu()) * of(mask)) @ of(A.cpu().to(dtype)).T * of(used)

    with executor.counting_launches() as names:
        S = shrink.of_rows(x, factors, drops, rank_spans)
        wide, saved = shrink.beside_rows(x, factors, drops, rank_spans, saves_S=True)
        same, none = shrink.beside_rows(x, factors, drops, rank_spans, saves_S=False)
    assert names == ["shrink"] * 3
    assert_accurate(
        S, plain(lambda t: t.double()), orders(lambda: plain(lambda t: t.to(dtype))), name="S"
    )
    assert_same_bits(saved, S, name="saved S")
    assert none is None
    for result in (wide, same):
        assert result.shape == (M, K + -(-R // 16) * 16)
        assert_same_bits(result[:, :K], x, name="copy of x")
        assert_same_bits(result[:, K : K + R], S, name="S beside x")
        assert not result[:, K + R :].any()


def test_every_order_of_tiles_gives_the_same_bits(ptx_executor):
    x, A = torch.randn(70, 136).to(BF16), torch.randn(20, 136)
    expected = shrink.beside_rows(x, [A], Dropout(0.3, 5), saves_S=True)
    with ptx_executor.with_options(schedule="reverse", resident=1):
        results = shrink.beside_rows(x, [A], Dropout(0.3, 5), saves_S=True)
    for value, same in zip(results, expected, strict=True):
        assert_same_bits(value, same, name="reverse")


def test_a_seed_in_memory_is_that_number(typical_executor):
    """As a captured CUDA graph keeps it."""
    seed = torch.tensor([(5 << 32) + 7], device=typical_executor.device)
    x, A = (torch.randn(size, 72).to(seed.device) for size in (20, 8))
    S, same = (shrink.of_rows(x, [A], Dropout(0.3, s)) for s in (int(seed), seed))
    assert_same_bits(same, S, name="S")
    dS = Shrunk(S)
    dX, same = (expand.input_gradient(dS, FP32, [A], Dropout(0.3, s)) for s in (int(seed), seed))
    assert_same_bits(same, dX, name="dX")


@pytest.mark.interpreter
def test_the_saved_S_does_not_keep_the_copy_of_x_alive():
    wide, S = shrink.beside_rows(torch.randn(3, 8), [torch.randn(2, 8)], saves_S=True)
    assert S.untyped_storage().nbytes() == 3 * 2 * 4
    assert S.untyped_storage().data_ptr() != wide.untyped_storage().data_ptr()


@pytest.mark.interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_stays_in_its_row(value):
    x, A = torch.randn(40, 24), torch.randn(3, 24)
    expected, _ = shrink.beside_rows(x, [A], saves_S=False)
    x[17] = value
    wide, _ = shrink.beside_rows(x, [A], saves_S=False)
    others = torch.arange(40) != 17
    assert_same_bits(wide[others], expected[others], name="other rows")
