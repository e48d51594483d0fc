"""Ranks that are no multiples of 16: the kernels move their rows in vectors nonetheless."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")
from lora_fast.kernels import (
    expand,
    expert_gradients,
    expert_product,
    expert_shrink,
    expert_sums,
    row_norms,
    scaling,
    strips,
    ticketed_gemm,
    weight_update,
)
from lora_fast.kernels.expert_product import LowRank
from lora_fast.kernels.tiles import NO_GAINS, factor_unit, unit_of
from offline_launches import meta

from bench.instruments import stub_driver

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
M, K, N, E = 2048, 4096, 4096, 8
ACCESS = re.compile(r"\b(ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bsuf](\d+)\s")
COPY = re.compile(r"\bcp\.async\.\w+\.shared\.global \[.*?\], \[.*?\], (0x\w+|\d+)")


@pytest.mark.parametrize(
    ("numbers", "unit"),
    [((16, 32), 1), ((8,), 8), ((24, 8), 8), ((16, 24), 8), ((12,), 4), ((4, 8, 12), 4), ((6,), 2),
     ((5, 16), 1), ((1,), 1), ((), 1)],
)  # fmt: skip
def test_the_unit_of_ranks(numbers: tuple[int, ...], unit: int) -> None:
    assert unit_of(*numbers) == unit


def test_the_unit_of_rows_of_factors() -> None:
    A, B, experts = torch.empty(8, 40), torch.empty(40, 8), torch.empty(3, 5, 4)
    assert factor_unit(B) == 8
    assert factor_unit(B, B[:, :4].contiguous()) == 4
    assert factor_unit(B[:, :4]) == 8
    assert factor_unit(A.T) == factor_unit(B, A.T) == 1
    assert factor_unit(experts) == 4
    assert factor_unit(torch.empty(4, 5, 3).permute(2, 1, 0)) == 1


def widths(ptx: str) -> Counter[tuple[str, int]]:
    """How often the code has each kind of access to global memory, and the bytes of a thread's."""
    found = Counter((op, int(n or 1) * int(bits) // 8) for op, n, bits in ACCESS.findall(ptx))
    return found + Counter(("copy", int(size, 0)) for size in COPY.findall(ptx))


def test_accesses_are_read_from_the_code() -> None:
    code = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.b16 {%rs1}, [%rd2];
    ld.global.gpu.acquire.b32 %r1, [%rd1];
    st.global.b16 [ %rd1 + 0 ], { %rs1 };
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd6 + 0 ], 0x10, %r7;
    cp.async.ca.shared.global [ %r5 + 0 ], [ %rd6 + 0 ], 4, %r7;
    """
    assert widths(code) == {
        ("ld", 16): 1, ("ld", 2): 1, ("ld", 4): 1, ("st", 2): 1, ("copy", 16): 1, ("copy", 4): 1,
    }  # fmt: skip


def _expand(R: int, dtype: torch.dtype) -> None:
    layers = [expand.Layer(meta(N, R), 2.0)] * 3
    expand.outputs(meta(M, 3 * R, dtype=dtype), dtype, layers)
    dY = meta(M, N, dtype=dtype)
    expand.input_gradient(scaling.new_gradient(dY, 3 * R, 128), dtype, [meta(R, K)] * 3)


def _strips(R: int, dtype: torch.dtype) -> None:
    dY, S, B = meta(M, N, dtype=dtype), meta(M, 2 * R, dtype=dtype), meta(N, R)
    layers = [strips.Layer(dY, B, 2.0)] * 2
    strips.grad_expand_group(layers, S, wanted=strips.Wanted(B=True), stores_dS=True)
    strips.grad_shrink(meta(M, K, dtype=dtype), scaling.new_gradient(dY, R, 128), FP32)


def _gemm(R: int, dtype: torch.dtype) -> None:
    x, dY, W = (meta(*shape, dtype=dtype) for shape in ((M, K), (M, N), (N, K)))
    A, B = meta(R, K), meta(N, R)
    ticketed_gemm.forward(x, W, A, B, 2.0)
    ticketed_gemm.grad_input([ticketed_gemm.Layer(dY, W, A, B, 2.0)])
    ticketed_gemm.grad_input([ticketed_gemm.Layer(dY, W, A, B, 2.0, meta(32, M, R))])


def _experts(R: int, dtype: torch.dtype) -> None:
    order, offsets = meta(M, dtype=torch.int64), meta(E, dtype=torch.int32)
    x, dY, W = (meta(*shape, dtype=dtype) for shape in ((M, K), (M, N), (E, N, K)))
    A, B, S = meta(E, R, K), meta(E, N, R), meta(M, R, dtype=dtype)
    dS = meta(M, R, dtype=expert_shrink.shrunk_dtype(dtype))
    expert_shrink.gather(dY, order, offsets, B, 2.0, is_grad=True)
    expert_product.product(x, W, offsets, LowRank(S, B, 2.0))
    expert_product.add_(x, offsets, LowRank(dS, A.mT))
    expert_gradients.gradients(dY, S, offsets, factor=B)
    expert_gradients.gradients(x, dS, offsets, factor=A, is_A=True)
    expert_sums.sums(offsets, order, meta(4, M, R), dtype=dtype)


def _weights(R: int, dtype: torch.dtype) -> None:
    W, A, B = meta(N, K, dtype=dtype), meta(R, K), meta(N, R)
    row_norms.norms_of(W, A, B, 2.0)
    weight_update.update(W, W, A, B, NO_GAINS, 2.0)


KERNELS = {
    "expand": _expand,
    "strips": _strips,
    "gemm": _gemm,
    "experts": _experts,
    "weights": _weights,
}


def _cases():
    """Rank, the multiple of 16 that it is computed as, and the bytes of one of its rows in 16 bits,
    or of the largest of its parts that all rows start at a multiple of."""
    for arch in (80, 90, 100):
        for R, whole, row in ((8, 16, 16), (4, 16, 8), (12, 16, 8), (24, 32, 16)):
            for dtype in (BF16, FP16):
                chosen = arch == 90 and R in (8, 12) and dtype == BF16
                yield pytest.param(
                    arch, R, whole, row, dtype, id=f"sm_{arch}-{R}-{dtype}",
                    marks=() if chosen else pytest.mark.exhaustive,
                )  # fmt: skip


@pytest.mark.offline
@pytest.mark.parametrize("launches", KERNELS.values(), ids=list(KERNELS))
@pytest.mark.parametrize(("arch", "R", "whole", "row", "dtype"), [*_cases()])
def test_rows_move_in_vectors(
    arch: int, R: int, whole: int, row: int, dtype: torch.dtype,
    launches: Callable[[int, torch.dtype], None],
) -> None:  # fmt: skip
    """No access is narrower than a row, but those that multiples of 16 have as well."""

    def narrow(R: int) -> list[tuple[str, int]]:
        with stub_driver.recording(arch) as log:
            launches(R, dtype)
        found = []
        for launch in log.launches:
            counts = widths(launch.kernel.text("ptx"))
            few = sum(n for (_, size), n in counts.items() if size < row)
            found.append((launch.name, few))
        return found

    for (name, found), (_, of_whole) in zip(narrow(R), narrow(whole), strict=True):
        assert found <= of_whole, name
