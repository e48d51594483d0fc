"""sm_100 in the PTX executor: tensor memory and tcgen05."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from bench.instruments.accuracy import assert_accurate, assert_same_bits
from tests import ptx_executor
from tests.ptx_executor import Deadlock, OutOfBounds, PTXError, SharedRace

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from ptx_kernels import (  # noqa: E402
    BF16,
    FP16,
    FP32,
    TF32_PRODUCTS,
    described_gemm,
    descriptors,
    dot,
    execute,
    gemm,
    lora,
    persistent_gemm,
    whole_numbers,
)

# What is taken out of PTX below is what one compiler makes of it.
pytestmark = [pytest.mark.compiled, pytest.mark.pinned]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TILE = (128, 64, 32, 4, 2)  # BLOCK_M, BLOCK_N, BLOCK_K, warps, stages


def product(dtype=BF16, tile=TILE, shape=(150, 120, 136), **options):
    """(y, exact y) of a gemm with these options of the executor."""
    (M, N, K), (*block, warps, stages) = shape, tile
    x, w = whole_numbers(M, K, dtype=dtype), whole_numbers(K, N, dtype=dtype)
    y = torch.full((M, N), float("nan"))
    names = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block, strict=True))
    grid = triton.cdiv(M, block[0]), triton.cdiv(N, block[1])
    with ptx_executor.installed(100, check_global_race=True, **options) as executor:
        gemm[grid](x, w, y, M, N, K, PRECISION="tf32", **names, num_warps=warps, num_stages=stages)
        assert set(executor.launches()[-1]["mma_by_kind"]) == {"tcgen05"}
    return y, (x.double() @ w.double()).float()


TILES = [(64, 64, 32, 4, 3), (64, 256, 32, 4, 2), (128, 128, 64, 8, 3), (128, 128, 64, 4, 2)]
TILES += [(128, 256, 64, 8, 2), (256, 128, 32, 8, 2)]


def _products():
    for dtype in (BF16, FP16, FP32, E4M3, E5M2):
        for tile in TILES:
            if dtype == FP32 and tile[1] == 256:
                continue  # does not fit
            usual = (dtype, tile) in ((BF16, TILES[2]), (E4M3, TILES[0]), (FP32, TILES[3]))
            marks = [] if usual else [pytest.mark.exhaustive]
            stages = 2 if dtype == FP32 else tile[-1]
            yield pytest.param(dtype, (*tile[:-1], stages), id=f"{dtype}-{tile}", marks=marks)


@pytest.mark.parametrize(("dtype", "tile"), [*_products()])
def test_products(dtype, tile):
    y, expected = product(dtype, tile, (300, 280, 128 if dtype.itemsize == 1 else 136))
    assert_same_bits(y, expected, name="y")


def test_real_numbers():
    x, w, y = torch.randn(128, 64), torch.randn(64, 64), torch.empty(128, 64)
    blocks = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}
    with ptx_executor.installed(100):
        gemm[(1, 1)](x, w, y, 128, 64, 64, PRECISION="tf32", **blocks)
    exact = x.double() @ w.double()
    assert_accurate(y, exact, x @ w, name="y", compute_dtype=TF32_PRODUCTS)


def test_accumulators_of_float16():
    x, w = whole_numbers(128, 64, dtype=FP16), whole_numbers(64, 64, dtype=FP16)
    y = torch.zeros(128, 64, dtype=FP16)
    with ptx_executor.installed(100) as executor:
        dot[(1,)](x, w, y, 128, 64, 64, tl.float16)
        assert executor.launches()[-1]["mma_by_kind"]["tcgen05"] == 4
    assert_same_bits(y, (x.double() @ w.double().T).to(FP16), name="y")


@pytest.mark.parametrize("specialize", [False, True])
@pytest.mark.parametrize(("kernel", "grid"), [(described_gemm, (3, 2)), (persistent_gemm, (2,))])
def test_warp_specialised_products(kernel, grid, specialize):
    M, N, K = 384, 256, 128
    x, w, y = whole_numbers(M, K), whole_numbers(N, K), torch.zeros(M, N, dtype=BF16)
    described = descriptors((x, [128, 64]), (w, [128, 64]), (y, [128, 128]))
    names = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "SPECIALIZE": specialize}
    with ptx_executor.installed(100, check_global_race=True) as executor:
        kernel[grid](*described, M, N, K, **names, num_warps=4, num_stages=3)
        assert (executor.launches()[-1]["threads"] > 128) == specialize
    assert_same_bits(y, (x.double() @ w.double().T).to(BF16), name="y")


def without(pattern, count=1, instead=""):
    """PTX without what a pattern matches, which must be there."""

    def transform(ptx):
        mutant, found = re.subn(pattern, instead, ptx, count=count)
        assert found, pattern
        return mutant

    return transform


NO_WAITING = without(r"@!complete bra\.uni waitLoop;", count=0)
SMALL = {"shape": (100, 64, 32)}


def test_a_result_is_hidden_until_the_commit_arrives():
    y, _ = product(**SMALL, transform=NO_WAITING, check_tensor=False, check_shared=False)
    assert y.isnan().all()


def test_a_load_without_its_wait():
    with pytest.raises(PTXError, match=r"wait::ld|read"):
        product(**SMALL, transform=without(r"tcgen05\.wait::ld\.sync\.aligned;"))


def test_a_missing_commit():
    with pytest.raises(Deadlock):
        product(**SMALL, transform=without(r"@%p\d+ tcgen05\.commit[^;]*;"))


def _without_barriers(ptx):
    """Between the store of the accumulator's initial value and the product."""
    stored, multiplied = ptx.index("tcgen05.wait::st"), ptx.index("tcgen05.mma")
    between = ptx[stored:multiplied].replace("bar.sync", "//bar.sync")
    return ptx[:stored] + between + ptx[multiplied:]


def test_a_store_without_its_wait_or_barrier():
    with pytest.raises(SharedRace, match="tensor memory"):
        product(transform=without(r"tcgen05\.wait::st\.sync\.aligned;"))
    with pytest.raises(SharedRace):
        product(transform=_without_barriers)


def test_an_operand_overwritten_while_it_is_read():
    with pytest.raises(SharedRace, match=r"tcgen05.mma is still reading|in flight|no barrier"):
        product(shape=(100, 64, 200), transform=NO_WAITING, check_tensor=False)


def test_tensor_memory_is_not_given_back():
    with pytest.raises(PTXError, match=r"tcgen05\.dealloc"):
        product(transform=without(r"@%p\d+ tcgen05\.dealloc[^;]*;"))


MMA = "tcgen05.mma.cta_group::1.kind::f16"


@pytest.mark.parametrize(
    ("known", "unknown"),
    [
        (MMA, "tcgen05.mma.cta_group::2.kind::f16"),
        (MMA, "tcgen05.mma.cta_group::1.kind::i8"),
        ("tcgen05.commit.cta_group::1", "tcgen05.commit.cta_group::2"),
    ],
)
def test_unknown_forms_are_not_executed(known, unknown):
    with pytest.raises(NotImplementedError, match=re.escape(unknown)):
        product(transform=lambda ptx: ptx.replace(known, unknown))


@triton.jit
def _scaled(
    x_ptr, w_ptr, scale_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[:, None], tl.arange(0, K)[None, :]
    s = tl.arange(0, K // 32)[None, :]
    x, w = tl.load(x_ptr + m * K + k), tl.load(w_ptr + n * K + k).T
    x_scale = tl.load(scale_ptr + m * (K // 32) + s)
    w_scale = tl.load(scale_ptr + n * (K // 32) + s)
    y = tl.dot_scaled(x, x_scale, "e4m3", w, w_scale, "e4m3")
    tl.store(y_ptr + m * N + tl.arange(0, N)[None, :], y)


def test_block_scaling_is_not_executed():
    x, w = (whole_numbers(128, 128, dtype=E4M3) for _ in range(2))
    scale = torch.full((128, 4), 127, dtype=torch.uint8)
    with ptx_executor.installed(100), pytest.raises(NotImplementedError, match="block_scale"):
        _scaled[(1,)](x, w, scale, torch.zeros(128, 128), 128, 128, 128)


def _two_products(**options):
    M = N = K = 128
    x, w = whole_numbers(M, K), whole_numbers(N, K)
    a, b = whole_numbers(16, K, most=1), whole_numbers(N, 16, most=1)
    y = torch.zeros(M, N)
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}
    with ptx_executor.installed(100, check_global_race=True, **options):
        lora[(1, 1)](x, w, a, b, y, M, N, K, 0.5, R=16, **blocks, num_warps=8, num_stages=2)
    low = (x.double() @ a.double().T).to(BF16).double()
    expected = x.double() @ w.double().T + 0.5 * low @ b.double().T
    assert_same_bits(y, expected.float(), name="y")


def test_tensor_memory_reused_without_a_barrier():
    """What Triton 3.7.1 does: eight warps read halves of the narrow accumulator's columns, and one
    of them may already store the initial value of the next accumulator in the same columns.
    """
    with pytest.raises(SharedRace, match=r"tcgen05.st writes tensor memory .* tcgen05.ld by warp"):
        _two_products()
    _two_products(check_tensor=False)
    wait = "tcgen05.wait::ld.sync.aligned;"
    _two_products(transform=lambda ptx: ptx.replace(wait, wait + " bar.sync 0;"))


HEAD = """
.version 8.7
.target sm_100a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry kern(.param .u64 .ptr .global .align 1 out)
.reqntid 128
{
.reg .pred %p<20>; .reg .b32 %r<40>; .reg .b64 %rd<20>;
ld.param.b64 %rd0, [out];
mov.u32 %r0, %tid.x;
shl.b32 %r1, %r0, 2;
cvt.u64.u32 %rd2, %r1;
add.s64 %rd3, %rd0, %rd2;
setp.lt.u32 %p0, %r0, 32;
mov.b32 %r2, smem;
@%p0 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2], 32;
bar.sync 0;
ld.shared.b32 %r3, [%r2];
shl.b32 %r4, %r0, 16;
and.b32 %r4, %r4, 6291456;
add.s32 %r5, %r3, %r4;
"""
TAIL = """
bar.sync 0;
@%p0 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, 32;
ret;
}
"""
STORE = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r5], {%r0}; "
STORED = STORE + "tcgen05.wait::st.sync.aligned; "
LOAD = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r6}, [%r5]; "
LOADED = LOAD + "tcgen05.wait::ld.sync.aligned; "
OUT = "st.global.b32 [%rd3], %r6; "


def run(body, tail=TAIL, **options):
    """What 128 threads store; %r5 is a warp's lanes of 32 allocated columns."""
    out = np.zeros(128, np.uint32)
    execute(HEAD + body + tail, {"out": out}, threads=128, shared=64, **options)
    return out


def test_cells():
    assert (run(STORED + LOADED + OUT) == np.arange(128)).all()
    plus_5 = "add.u32 %r7, %r6, 5; tcgen05.wait::ld.sync.aligned; st.global.b32 [%rd3], %r7;"
    assert (run(STORED + LOAD + plus_5) == np.arange(128) + 5).all()
    # What leaves the registers before the wait is not the value, nor are cells that nobody wrote.
    assert (run(STORED + LOAD + OUT + "tcgen05.wait::ld.sync.aligned;") == 0x7FDF7FDF).all()
    assert (run(LOADED + OUT) == 0x7FDF7FDF).all()


MORE = "@%p0 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2 + 16], {};"
RELINQUISH = "@%p0 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;"


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (LOADED.replace("[%r5]", "[%r5 + 32]"), OutOfBounds, "not allocated"),
        (LOADED.replace("[%r5]", "[%r3]"), OutOfBounds, "reaches lanes"),
        (LOAD, SharedRace, r"dealloc frees .* tcgen05.ld by warp"),
        (MORE.format(48), PTXError, "power of two"),
        (MORE.format(512), PTXError, "waits for ever"),
        (RELINQUISH + MORE.format(32), PTXError, "relinquish"),
    ],
)
def test_allocation_and_lanes(body, error, message):
    with pytest.raises(error, match=message):
        run(body)


def test_what_is_left_at_the_end():
    with pytest.raises(PTXError, match=r"without tcgen05\.wait::ld"):
        run(LOAD, check_tensor=False)
    with pytest.raises(PTXError, match=r"no tcgen05\.alloc returned"):
        run("", TAIL.replace("%r3, 32", "%r3, 64"))
