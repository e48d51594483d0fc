"""DoRA's norms by the kernel and by the torch backend, against float64."""

from __future__ import annotations

import pytest
import torch

from bench.instruments.accuracy import assert_accurate, orders
from lora_fast import NF4Weight
from lora_fast.base_layer.row_norms import row_norms

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    (50, 72, 5, FP32, FP32, False),
    (64, 256, 16, BF16, FP32, False),
    (33, 131, 100, FP16, FP16, False),
    (48, 128, 64, BF16, BF16, True),
    (20, 64, 8, FP32, FP32, True),
]


def _factors(N, K, R, dtype, adapter, nf4, device="cpu"):
    torch.manual_seed(0)
    W = torch.randn(N, K).to(dtype).to(device)
    A, B = (torch.randn(s).mul(0.3).to(adapter).to(device) for s in ((R, K), (N, R)))
    return NF4Weight.from_dense(W) if nf4 else W, A, B


def _check(norms, weight, A, B, scaling):
    W = weight.dequantize(weight.dtype) if isinstance(weight, NF4Weight) else weight
    dtype = W.dtype
    W, A, B = W.cpu(), A.cpu(), B.cpu()
    exact = torch.linalg.vector_norm(W.double() + scaling * (B.double() @ A.double()), dim=1)
    eager = orders(
        lambda: torch.linalg.vector_norm(W + (scaling * (B.to(dtype) @ A.to(dtype))), dim=1)
    )
    assert norms.dtype == FP32
    assert_accurate(norms, exact, eager, name="norms", compute_dtype=dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_backend(case):
    weight, A, B = _factors(*case)
    _check(row_norms(weight, A, B, 0.7), weight, A, B, 0.7)


def test_an_adapter_that_adds_nothing_leaves_the_length_of_the_rows():
    """Bitwise, since PEFT sets m to these norms: g is 1 before training."""
    weight, A, B = torch.randn(70, 300), torch.randn(8, 300), torch.zeros(70, 8)
    B[0] = 1.0
    norms, lengths = row_norms(weight, A, B, 0.7), torch.linalg.norm(weight, dim=1)
    assert (norms != lengths).nonzero().tolist() == [[0]]


@pytest.mark.parametrize("case", CASES[1:4:2], ids=str)
def test_kernel(executor, case):
    _check_kernel(executor, case)


@pytest.mark.parametrize("case", CASES[0::2], ids=str)
def test_kernel_in_rarer_cases(typical_executor, case):
    _check_kernel(typical_executor, case)


def _check_kernel(executor, case):
    weight, A, B = _factors(*case, device=executor.device)
    with executor.counting_launches() as names:
        _check(row_norms(weight, A, B, 0.7), weight, A, B, 0.7)
    assert names == [*["nf4_decode"] * case[-1], "row_norms"]


def _write_without_a_trace(weight, A, B):
    """Norms after every kind of write that changes neither the object nor its version."""
    first = row_norms(weight, A, B, 0.7)
    before = first.clone()
    for factor in (A, B, weight):
        versions = [t._version for t in (A, B, weight)]
        factor.data[-1, -1] += 4.0
        assert versions == [t._version for t in (A, B, weight)]
        _check(row_norms(weight, A, B, 0.7), weight, A, B, 0.7)
    _check(row_norms(weight, A, B, -2.0), weight, A, B, -2.0)
    wider = torch.cat([A, A]), torch.cat([B, B], dim=1)
    _check(row_norms(weight, *wider, -2.0), weight, *wider, -2.0)
    assert torch.equal(first, before)


def test_torch_backend_sees_every_write():
    _write_without_a_trace(*_factors(*CASES[0]))


def test_kernel_sees_every_write(typical_executor):
    _write_without_a_trace(*_factors(*CASES[0], device=typical_executor.device))


def test_bytes_of_a_packed_weight_that_are_written_are_seen():
    weight, A, B = _factors(*CASES[3])
    row_norms(weight, A, B, 0.7)
    weight.packed.data.bitwise_xor_(0x35)
    _check(row_norms(weight, A, B, 0.7), weight, A, B, 0.7)
    weight.quant_state.absmax.data.bitwise_xor_(0x11)
    _check(row_norms(weight, A, B, 0.7), weight, A, B, 0.7)
