"""The kernels over the rows of experts, compiled for absent GPUs: what they take of a device, the
products that they use, and that these are fenced and not serialised."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton")
from lora_fast.kernels import (
    expert_gradients,
    expert_product,
    expert_scatter,
    expert_shrink,
)
from lora_fast.kernels.expert_product import LowRank
from offline_launches import assert_walk_fits

from bench.instruments import stub_driver

ARCHS = [80, 89, 90, 100, 120]
# Of 128 experts; more make no other kernel but for the search of a program's expert.
E, T, CHOICES, H, INNER = 128, 2048, 8, 2048, 768
# Bytes of local memory that no loop touches: of rank 64 on sm_100 expert_gradients leaves 14
# registers there while it walks down the rows.
AWAY_FROM_LOOPS = 56
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """The second projection of a Qwen3-30B-A3B layer."""

    R: int = 16
    dtype: torch.dtype = BF16
    adapter: torch.dtype = FP32


PLAIN = Case()
CASES = {
    "plain": PLAIN,
    "r64": replace(PLAIN, R=64),
    "r100": replace(PLAIN, R=100),
    "bfloat16-adapters": replace(PLAIN, adapter=BF16),
    "float16": replace(PLAIN, dtype=FP16),
    "float32": replace(PLAIN, dtype=FP32, R=64),
}
SAMPLE = ("plain", "float16", "float32")


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of(arch: int, case: Case) -> stub_driver.Log:
    """Every kernel as the backend launches it."""
    P, R, dtype = T * CHOICES, case.R, case.dtype
    order, offsets = _meta(P, dtype=torch.int64), _meta(E, dtype=torch.int32)
    x, dout, h = (
        _meta(T, INNER, dtype=dtype),
        _meta(T, H, dtype=dtype),
        _meta(P, INNER, dtype=dtype),
    )
    W, bias = _meta(E, H, INNER, dtype=dtype), _meta(E, H, dtype=case.adapter)
    A, B = _meta(E, R, INNER, dtype=case.adapter), _meta(E, H, R, dtype=case.adapter)
    w, S = _meta(T, CHOICES, dtype=FP32), _meta(P, R, dtype=dtype)
    dS = _meta(P, R, dtype=expert_shrink.shrunk_dtype(dtype))
    with stub_driver.recording(arch) as log:
        found = expert_shrink.gather(x, order, offsets, A.mT)
        expert_shrink.gather(x, order, offsets, A.mT, widens=True)
        expert_shrink.gather(dout, order, offsets, B, 2.0, vector=bias, is_grad=True)
        expert_shrink.gather(h, None, offsets, A.mT, stores_rows=False)
        y = expert_product.product(h, W, offsets, LowRank(S, B, 2.0), bias)
        expert_product.product(y, W.mT, offsets, LowRank(dS, A.mT))
        expert_product.add_(y, offsets, LowRank(S, B, 2.0), bias)
        expert_product.add_(h, offsets, LowRank(dS, A.mT))
        sort = {"order": order, "w": w}
        expert_gradients.gradients(dout, S, offsets, factor=B, bias=bias, gathers=True, **sort)
        expert_gradients.gradients(dout, S, offsets, factor=B, gathers=True, **sort)
        expert_gradients.gradients(h, dS, offsets, factor=A, is_A=True, **sort)
        expert_gradients.gradients(x, dS, offsets, factor=A, is_A=True, order=order, gathers=True)
        expert_gradients.gradients(h, dS, offsets, factor=A, is_A=True)
        expert_scatter.scatter(y, found.back, offsets, T, w)
        expert_scatter.scatter(y, found.back, offsets, T)
    return log


MATRIX = [
    pytest.param(
        arch,
        case,
        id=f"sm_{arch}-{name}",
        marks=[] if arch == 90 and name in SAMPLE else pytest.mark.exhaustive,
    )
    for arch in ARCHS
    for name, case in CASES.items()
]


@pytest.mark.offline
@pytest.mark.parametrize(("arch", "case"), MATRIX)
def test_all_fit_the_device(arch: int, case: Case) -> None:
    for launch in launches_of(arch, case).launches:
        multiplies = launch.name != "expert_scatter" and case.dtype != FP32
        assert_walk_fits(launch, arch, away_from_loops=AWAY_FROM_LOOPS, multiplies=multiplies)
