"""Offsets of 2³¹ elements and more: in memory that is only reserved, and for real on a GPU."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from equation import Case, eager, exact, fused, make

from bench.instruments.accuracy import assert_all_accurate, assert_same_bits

pytest.importorskip("triton")
from bitsandbytes.functional import QuantState
from lora_fast.kernels import expand, nf4_decode, shrink
from lora_fast.kernels.dropout import Dropout
from lora_fast.kernels.scaling import Shrunk

import lora_fast
from lora_fast import NF4Weight
from lora_fast.backends.selection import backend_for
from lora_fast.functional import adapted_linear

BF16, FP32 = torch.bfloat16, torch.float32
# Linux's; Python names it from 3.13 on.
MAP_NORESERVE = 0x4000
# More rows than a step of a K-loop has, the last one beyond 2³² elements; what 32 bits make of an
# offset stays inside the reserved memory, where there are zeros.
STRIDE = 2**26 + 64
ROWS = 72
SPAN = 2**31 + ROWS * STRIDE


@pytest.fixture
def _kernels() -> Iterator[None]:
    with lora_fast.set_backend("triton"):
        yield


@pytest.fixture
def _in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter copies every storage onto itself after a launch: that would fill the pages of
    what is only reserved."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)


def far_apart(values: torch.Tensor) -> torch.Tensor:
    """The same rows, STRIDE elements from each other."""
    bytes_ = mmap.mmap(
        -1, SPAN * values.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    )
    whole = torch.frombuffer(bytes_, dtype=values.dtype)
    with torch.no_grad():
        return whole.as_strided(values.shape, (STRIDE, 1), 2**31).copy_(values.detach())


@pytest.mark.interpreter
@pytest.mark.usefixtures("_kernels", "_in_place")
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
def test_operands_with_rows_far_apart(turned: bool) -> None:
    """Or their columns."""
    trains = ("x", "A") if turned else ("x", "A", "B", "g")
    case = Case(M=ROWS, K=ROWS, N=ROWS, R=ROWS, dtype=BF16, adapter_dtype=FP32,
                factors=("x", "A", "B", "g"), trains=trains)  # fmt: skip

    def spread(values: torch.Tensor) -> torch.Tensor:
        return far_apart(values.mT).mT if turned else far_apart(values)

    near, far = make(case), make(case)
    for name in ("x", "A", "B"):
        far.tensors[name] = spread(far.tensors[name]).requires_grad_(name in trains)
    far.weight, far.dY = spread(far.dense), spread(far.dY)
    expected = fused(near)
    for name, value in fused(far).items():
        if value is not None:
            assert_same_bits(value, expected[name], name=name)


@pytest.mark.interpreter
@pytest.mark.usefixtures("_kernels", "_in_place")
def test_weights_with_rows_far_apart() -> None:
    W, A, B = torch.randn(ROWS, 40), torch.randn(3, 40), torch.randn(ROWS, 3)
    far, out = far_apart(W), far_apart(torch.zeros(ROWS, 40))
    expected = backend_for(W.device).row_norms(W, A, B, 0.7)
    norms = backend_for(W.device).row_norms(far, A, B, 0.7)
    assert_same_bits(norms, expected, name="norms")
    backend_for(far.device).update_weight(far, out, A=far_apart(A), B=far_apart(B), scaling=0.7)
    backend_for(W.device).update_weight(W, W, A=A, B=B, scaling=0.7)
    assert_same_bits(out.contiguous(), W, name="W")


@pytest.mark.interpreter
@pytest.mark.usefixtures("_in_place")
def test_the_kernels_beside_cublas_with_rows_far_apart() -> None:
    x, A, B = (torch.randn(ROWS, size) for size in (40, 40, 20))
    weight = NF4Weight.from_dense(torch.randn(ROWS, 64))

    def results(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> list[torch.Tensor]:
        wide, S = shrink.beside_rows(x, [A[:20]], Dropout(0.3, 7), saves_S=True)
        (y,) = expand.outputs(S, FP32, [expand.Layer(B, 0.5)])
        dX = expand.input_gradient(Shrunk(B), FP32, [A[:20]], Dropout(0.3, 7))
        W = nf4_decode.augmented(weight.packed, weight.quant_state, FP32, B, columns=32)
        return [wide, S, y, dX, W]

    for far, near in zip(results(*map(far_apart, (x, A, B))), results(x, A, B), strict=True):
        assert_same_bits(far, near, name="far apart")


def last_rows(case: Case, device: str) -> tuple[Any, Any]:
    """Operands of `case`, and the same below zeros, so many that y or dX has 2³¹ elements."""
    few = make(case, device)
    many = make(case, device)
    M = 2**31 // max(case.N, case.K) + case.M
    for_x = torch.zeros(M, case.K, dtype=case.dtype, device=device)
    for_x[-case.M :] = few.tensors["x"].detach()
    many.tensors["x"] = for_x.requires_grad_()
    many.dY = torch.zeros(M, case.N, dtype=case.dtype, device=device)
    many.dY[-case.M :] = few.dY
    return few, many


@pytest.mark.gpu
@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize(("N", "K"), [(32768, 64), (64, 32768)])
def test_products_of_more_elements(N: int, K: int) -> None:
    case = Case(M=8, K=K, N=N, R=16, dtype=BF16, adapter_dtype=FP32, factors=("x", "A", "B"))
    few, many = last_rows(case, "cuda")
    results = fused(many)
    assert max(results[name].numel() for name in ("y", "dx")) > 2**31
    found = {
        name: value[-case.M :] if name in ("y", "dx") else value for name, value in results.items()
    }
    assert_all_accurate(found, exact(few), eager(few), compute_dtype=BF16)


@pytest.mark.gpu
@pytest.mark.usefixtures("_kernels")
def test_a_packed_weight_of_more_elements() -> None:
    N, K, rows = 65544, 32768, 8
    case = Case(M=8, K=K, N=rows, R=16, dtype=BF16, adapter_dtype=FP32, nf4=True, nested=False)
    few = make(replace(case, factors=("x", "A", "B"), trains=()), "cuda")
    state = few.weight.quant_state
    packed = torch.zeros(N * K // 2, dtype=torch.uint8, device="cuda")
    packed[-few.weight.packed.numel() :] = few.weight.packed
    absmax = torch.ones(N * K // 64, device="cuda")
    absmax[-state.absmax.numel() :] = state.absmax
    shape = torch.Size((N, K))
    large = NF4Weight(
        packed,
        QuantState(absmax, shape, code=state.code, blocksize=64, quant_type="nf4", dtype=BF16),
    )
    decoded = nf4_decode.decode(large.packed, large.quant_state, BF16)
    assert decoded.numel() > 2**31
    assert_same_bits(decoded[-rows:], few.dense, name="W")
    A, B = few.tensors["A"], torch.zeros(N, case.R, device="cuda")
    B[-rows:] = few.tensors["B"]
    y = adapted_linear(few.tensors["x"], large, A=A, B=B, scaling=case.scaling)
    names = {"y": y[:, -rows:], "dx": None, "dA": None, "dB": None}
    assert_all_accurate(names, exact(few), eager(few), compute_dtype=BF16)
