"""The low-rank part of outputs and of dX by itself, on every machine that runs kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from lora_fast.kernels import dropout, expand, scaling
from lora_fast.kernels.dropout import NO_DROPOUT, Dropout
from lora_fast.kernels.scaling import Shrunk
from lora_fast.kernels.tiles import NO_GAINS, Gains

from bench.instruments.accuracy import assert_accurate, assert_same_bits, orders

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Rows, columns, ranks, dtype of x and of the factors: more than a tile of each, ragged and not; a
# rank of several chunks; a group.
CASES = {
    "ragged": (70, (136,), (5,), BF16, FP32),
    "aligned": (128, (256,), (64,), BF16, FP32),
    "float32": (35, (72,), (100,), FP32, FP32),
    "float16": (70, (130,), (16,), FP16, FP16),
    "group": (66, (72, 40, 136), (5, 16, 8), BF16, FP32),
    "group of eights": (66, (75, 40, 131), (8, 24, 8), BF16, FP32),
    "group of fours": (37, (75, 131), (4, 12), FP16, FP16),
}


def factors_of(columns, ranks, dtype, device):
    return [torch.randn(L, R).to(dtype).to(device) for L, R in zip(columns, ranks, strict=True)]


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_outputs(executor, case):
    M, columns, ranks, dtype, adapter = case
    S = torch.randn(M, sum(ranks)).to(dtype).to(executor.device)
    factors = factors_of(columns, ranks, adapter, executor.device)
    biases = [None, *(torch.randn(L).to(dtype).to(executor.device) for L in columns[1:])]
    layers = [
        expand.Layer(factor, 0.5 + i, bias)
        for i, (factor, bias) in enumerate(zip(factors, biases, strict=True))
    ]
    with executor.counting_launches() as names:
        ys = expand.outputs(S, dtype, layers)
    assert names == ["expand"]
    for y, layer, S_i in zip(ys, layers, S.split(ranks, dim=1), strict=True):

        def plain(of, layer=layer, S_i=S_i):
            y = of(S_i) @ of(layer.factor.to(dtype)).T * layer.scaling
            return y if layer.bias is None else y + of(layer.bias)

        assert_accurate(
            y, plain(lambda t: t.cpu().double()), orders(lambda: plain(lambda t: t.cpu())), name="y"
        )


def test_gains_scale_the_factor_before_it_is_rounded(executor):
    M, N, R = 40, 72, 8
    S, b, d, B, bias = (
        torch.randn(shape, device=executor.device) for shape in ((M, R), N, R, (N, R), N)
    )
    y = expand.outputs(S.to(BF16), BF16, [expand.Layer(B, 0.5, bias.to(BF16))], Gains(b, d))[0]
    Q = (0.5 * b.unsqueeze(1) * d * B).to(BF16)
    expected = S.to(BF16).double() @ Q.double().T + bias.to(BF16)
    assert_accurate(y.cpu(), expected.cpu(), expected.cpu().to(BF16), name="y")


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_gradient_of_x(executor, case, p):
    M, (K, *_), ranks, dtype, adapter = case
    device = executor.device
    drops = Dropout(p, 11) if p else NO_DROPOUT
    factors = [A.T.contiguous() for A in factors_of([K] * len(ranks), ranks, adapter, device)]
    dS = scaled(torch.randn(M, sum(ranks), device=device), dtype)
    with executor.counting_launches() as names:
        dX = expand.input_gradient(dS, dtype, factors, drops)
    assert names == ["expand"]
    mask = torch.ones(M, K)
    if p:
        mask = dropout.dropout_mask(M, K, drops, device).cpu() * drops.keep_scale

    def plain(of):
        return of(dS.values.cpu().to(dtype)) @ of(torch.cat(factors).cpu().to(dtype)) * of(mask)

    assert_accurate(
        dX,
        plain(lambda t: t.double()),
        orders(lambda: plain(lambda t: t.to(dtype))),
        name="dX",
    )


def scaled(values: torch.Tensor, dtype: torch.dtype, tile_rows: int = 32) -> Shrunk:
    """dS as the kernels leave it: in float16 float32, and beside it the largest of its tiles."""
    if dtype != FP16:
        return Shrunk(values.to(dtype))
    dS = scaling.new_gradient(values.to(dtype), values.shape[1], tile_rows)
    dS.values.copy_(values)
    for i, rows in enumerate(values.split(tile_rows)):
        dS.largest[i] = rows.abs().amax(0)
    return dS


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_float16_gradient_keeps_its_digits_however_small_dS_is(executor, p):
    """dS of 2⁻³⁰ is no float16; dS A is, with an A of 2¹⁶ (in float32, its operand is 1)."""
    M, K, R = 70, 40, 8
    drops = Dropout(p, 11) if p else NO_DROPOUT
    values, A = torch.randn(M, R, device=executor.device), torch.randn(R, K, device=executor.device)
    A = A.to(FP16).float()
    small = expand.input_gradient(scaled(values * 2.0**-30, FP16), FP32, [A], drops)
    # Stored in float32 so that the result itself can be as small.
    large = expand.input_gradient(scaled(values, FP16), FP32, [A], drops)
    assert_same_bits(small * 2.0**30, large, name="dX")


def test_every_order_of_tiles_gives_the_same_bits(ptx_executor):
    M, N, R = 130, 136, 20
    S, B = torch.randn(M, R).to(BF16), torch.randn(N, R)

    def results():
        (y,) = expand.outputs(S, BF16, [expand.Layer(B, 0.5)])
        return y, expand.input_gradient(Shrunk(S), BF16, [B.T], Dropout(0.3, 5))

    expected = results()
    with ptx_executor.with_options(schedule="reverse", resident=1):
        for value, same in zip(results(), expected, strict=True):
            assert_same_bits(value, same, name="reverse")


@pytest.mark.interpreter
def test_nothing_to_do():
    (y,) = expand.outputs(torch.empty(0, 4), FP32, [expand.Layer(torch.empty(6, 4))], NO_GAINS)
    assert y.shape == (0, 6)
