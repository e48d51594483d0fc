"""The PTX executor's matrix products: mma.sync, wgmma and tcgen05, by pointers and by TMA."""

from __future__ import annotations

import pytest
import torch

from bench.instruments.accuracy import assert_accurate, assert_same_bits
from tests import ptx_executor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from ptx_kernels import (  # noqa: E402
    BF16,
    FP16,
    FP32,
    FP64,
    TF32_PRODUCTS,
    described_gemm,
    descriptors,
    dot,
    gemm,
    lora,
    persistent_gemm,
    whole_numbers,
)

pytestmark = pytest.mark.compiled
KINDS = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def rest(*values, keep):
    """Parameters, of which all but one are exhaustive."""
    return [
        pytest.param(value, marks=[] if value == keep else [pytest.mark.exhaustive], id=str(value))
        for value in values
    ]


def _product(x, w, block, precision="tf32", **launch):
    M, N, K = x.shape[0], w.shape[1], x.shape[1]
    y = torch.full((M, N), float("nan"), dtype=x.dtype)
    grid = triton.cdiv(M, block[0]), triton.cdiv(N, block[1])
    names = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block, strict=True))
    gemm[grid](x, w, y, M, N, K, PRECISION=precision, **names, **launch)
    return y


@pytest.mark.parametrize("precision", rest("tf32", "ieee", "tf32x3", keep="ieee"))
def test_real_numbers_in_float32(sm, precision):
    x, w = torch.randn(100, 90), torch.randn(90, 70)
    block = (32, 32, 16) if precision == "ieee" else (64, 64, 32)
    y = _product(x, w, block, precision)
    compute = TF32_PRODUCTS if precision == "tf32" else None
    assert_accurate(y, x.double() @ w.double(), x @ w, name=precision, compute_dtype=compute)


@pytest.mark.parametrize(
    "shape", rest((100, 70, 90), (129, 200, 33), (64, 128, 64), keep=(100, 70, 90))
)
@pytest.mark.parametrize("dtype", rest(FP16, BF16, FP32, keep=FP16))
def test_masked(sm, dtype, shape):
    M, N, K = shape
    x, w = whole_numbers(M, K, dtype=dtype), whole_numbers(K, N, dtype=dtype)
    y = _product(x, w, (64, 64, 32))
    assert_same_bits(y, (x.double() @ w.double()).to(dtype), name="y")
    assert set(ptx_executor.launches()[-1]["mma_by_kind"]) <= set(KINDS.values())


TILES = [(128, 128, 64, 8, 3), (64, 128, 32, 4, 2), (32, 64, 64, 4, 4), (128, 256, 64, 8, 3)]
TILES.append((64, 64, 16, 4, 2))


@pytest.mark.parametrize("tile", rest(*TILES, keep=TILES[0]))
@pytest.mark.parametrize("dtype", rest(BF16, FP32, keep=BF16))
def test_tiles(sm, dtype, tile):
    *block, warps, stages = tile
    if block[1] == 256 and (sm == 80 or dtype == FP32):
        pytest.skip("does not fit shared memory")
    x, w = whole_numbers(136, 200, dtype=dtype), whole_numbers(200, 264, dtype=dtype)
    y = _product(x, w, block, num_warps=warps, num_stages=2 if dtype == FP32 else stages)
    assert_same_bits(y, (x.double() @ w.double()).to(dtype), name="y")


@pytest.mark.parametrize("dtype", rest(BF16, FP16, keep=BF16))
@pytest.mark.parametrize("shape", rest((128, 128, 128), (200, 150, 136), keep=(200, 150, 136)))
def test_two_products_in_one_loop(sm, dtype, shape):
    if sm == 100:  # Triton 3.7.1 reuses tensor memory here: test_sm_100.py
        ptx_executor.install(sm, check_tensor=False)
    M, N, K = shape
    x, w, a, b = (whole_numbers(*size, dtype=dtype) for size in ((M, K), (N, K), (16, K), (N, 16)))
    y = torch.zeros(M, N, dtype=dtype)
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
    grid = triton.cdiv(M, 128), triton.cdiv(N, 128)
    lora[grid](x, w, a, b, y, M, N, K, 0.5, R=16, **blocks, num_warps=8, num_stages=3)
    low = (x.double() @ a.double().T).to(dtype).double()
    expected = x.double() @ w.double().T + 0.5 * low @ b.double().T
    assert_same_bits(y, expected.to(dtype), name="y")


@triton.jit
def _dequantising(
    x_ptr, q_ptr, scale_ptr, y_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights are 4-bit codes, two to a byte along K, with a scale for every row."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    offs_k = tl.arange(0, BLOCK_K)
    scale = tl.load(scale_ptr + offs_n)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + offs_m * K + (k + offs_k)[None, :])
        byte = tl.load(q_ptr + offs_n * (K // 2) + ((k + offs_k) // 2)[:, None])
        code = (byte >> (4 * (offs_k[:, None] % 2))) & 15
        acc = tl.dot(x, ((code.to(tl.float32) - 8) * scale).to(tl.bfloat16), acc)
    tl.store(y_ptr + offs_m * N + offs_n, acc.to(tl.bfloat16))


def test_dequantised_operand(sm):
    M, N, K = 64, 128, 128
    x, codes = whole_numbers(M, K), torch.randint(0, 16, (N, K), dtype=torch.uint8)
    packed, scale = codes[:, ::2] | (codes[:, 1::2] << 4), 2.0 ** whole_numbers(N, dtype=FP32)
    y = torch.zeros(M, N, dtype=BF16)
    _dequantising[(1, 2)](x, packed, scale, y, M, N, K, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)
    w = (codes.double() - 8) * scale[:, None].double()
    assert_same_bits(y, (x.double() @ w.T).to(BF16), name="y")


@pytest.mark.pinned  # for sm_100 Triton 3.8 makes products of kind i8, which are not executed
def test_integers(sm):
    x, w = (torch.randint(-128, 128, (64, 64), dtype=torch.int8) for _ in range(2))
    y = torch.zeros(64, 64, dtype=torch.int32)
    dot[(1,)](x, w, y, 64, 64, 64, tl.int32)
    assert torch.equal(y, x.int() @ w.int().T)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8(dtype):
    x, w = whole_numbers(64, 128, dtype=dtype), whole_numbers(64, 128, dtype=dtype)
    y = torch.zeros(64, 64)
    with ptx_executor.installed(90):
        dot[(1,)](x, w, y, 64, 64, 128, tl.float32)
    assert torch.equal(y.double(), x.double() @ w.double().T)


@pytest.mark.parametrize(
    "shape", rest((16, 16, 16), (64, 64, 64), (128, 16, 32), keep=(16, 16, 16))
)
def test_accumulators_of_float64_and_float16(sm, shape):
    M, N, K = shape
    if sm == 100 and M > 16:
        pytest.skip("Triton compiles no float64 product of this size for sm_100")
    x, w = whole_numbers(M, K, dtype=FP64), whole_numbers(N, K, dtype=FP64)
    for dtype, out in ((FP64, tl.float64), (FP16, tl.float16)):
        y = torch.zeros(M, N, dtype=dtype)
        dot[(1,)](x.to(dtype), w.to(dtype), y, M, N, K, out)
        assert torch.equal(y.double(), x @ w.T)


@triton.jit
def _described_on_the_device(
    x_ptr, w_ptr, y_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    x = tl.make_tensor_descriptor(x_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    w = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    y = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(x.load([m, k]), w.load([n, k]).T, acc)
    y.store([m, n], acc.to(tl.bfloat16))


def _allocate(size, align, stream):
    return torch.zeros(size, dtype=torch.int8)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(
    "block", rest((128, 128, 64), (64, 64, 32), (64, 128, 16), keep=(64, 64, 32))
)
def test_tensor_descriptors(sm, on_device, block):
    M, N, K = 200, 136, 104
    x, w, y = whole_numbers(M, K), whole_numbers(N, K), torch.full((M, N), 99.0).to(BF16)
    m, n, k = block
    grid, names = (triton.cdiv(M, m), triton.cdiv(N, n)), {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    if on_device:
        triton.set_allocator(_allocate)
        _described_on_the_device[grid](x, w, y, M, N, K, **names)
    else:
        described = descriptors((x, [m, k]), (w, [n, k]), (y, [m, n]))
        described_gemm[grid](*described, M, N, K, **names, SPECIALIZE=False)
    assert_same_bits(y, (x.double() @ w.double().T).to(BF16), name="y")
    if sm == 90:
        assert ptx_executor.report()["instructions"]["cp.async.bulk"] > 0


@pytest.mark.parametrize("specialize", rest(False, True, keep=False))
def test_persistent_tiles_by_descriptors(specialize):
    M, N, K = 200, 300, 96
    x, w = whole_numbers(M, K), whole_numbers(N, K)
    y = torch.zeros(M, 304, dtype=BF16)[:, :N]
    described = descriptors((x, [64, 32]), (w, [64, 32]), (y, [64, 64]))
    names = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "SPECIALIZE": specialize}
    with ptx_executor.installed(90):
        persistent_gemm[(3,)](*described, M, N, K, **names, num_warps=4, num_stages=3)
    assert_same_bits(y, (x.double() @ w.double().T).to(BF16), name="y")


@triton.jit
def _reduced_3d(x_ptr, y_ptr, A, B, C, SA: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr):
    x = tl.make_tensor_descriptor(
        x_ptr, [A, B, C], [B * C, C, 1], [SA, SB, SC], padding_option="nan"
    )
    y = tl.make_tensor_descriptor(y_ptr, [A, B, C], [B * C, C, 1], [SA, SB, SC])
    pid = tl.program_id(0)
    tile = x.load([pid, 3, 4])
    y.atomic_add([pid, 3, 4], tile + tile)


def test_reductions_by_descriptors(sm):
    triton.set_allocator(_allocate)
    x, y = whole_numbers(6, 12, 20, dtype=FP32), torch.ones(6, 12, 20)
    _reduced_3d[(3,)](x, y, 6, 12, 20, SA=2, SB=8, SC=16)
    expected = torch.ones(6, 12, 20)
    for pid in range(3):
        expected[pid : pid + 2, 3:11, 4:20] += 2 * x[pid : pid + 2, 3:11, 4:20]
    assert_same_bits(y, expected, name="y")


@triton.jit
def _transposed(x_ptr, y_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    p = tl.make_block_ptr(x_ptr, (M, N), (N, 1), (0, 0), (BLOCK_M, BLOCK_N), (1, 0))
    q = tl.make_block_ptr(y_ptr, (N, M), (1, N), (0, 0), (BLOCK_N, BLOCK_M), (0, 1))
    for _ in range(0, N, BLOCK_N):
        tile = tl.load(p, boundary_check=(0, 1), padding_option="zero")
        tl.store(q, tl.trans(tile), boundary_check=(0, 1))
        p, q = tl.advance(p, (0, BLOCK_N)), tl.advance(q, (BLOCK_N, 0))


def test_block_pointers(sm):
    x, y = torch.randn(50, 100), torch.zeros(50, 100)
    _transposed[(1,)](x, y, 50, 100, BLOCK_M=64, BLOCK_N=32)
    assert torch.equal(x, y)


@triton.jit
def _attention(
    q_ptr, k_ptr, v_ptr, out_ptr, T, scale,
    BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Causal attention of one head."""
    pid = tl.program_id(0)
    rows, steps, d = pid * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, D)
    q = tl.load(q_ptr + rows[:, None] * D + d[None, :], mask=rows[:, None] < T, other=0.0)
    most = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, D), tl.float32)
    for start in range(0, (pid + 1) * BLOCK, BLOCK):
        j = start + steps
        k = tl.load(k_ptr + j[None, :] * D + d[:, None], mask=j[None, :] < T, other=0.0)
        x = tl.dot(q, k) * scale
        x = tl.where((j[None, :] <= rows[:, None]) & (j[None, :] < T), x, -1e30)
        new = tl.maximum(most, tl.max(x, 1))
        e, shrunk = tl.exp(x - new[:, None]), tl.exp(most - new)
        total = total * shrunk + tl.sum(e, 1)
        v = tl.load(v_ptr + j[:, None] * D + d[None, :], mask=j[:, None] < T, other=0.0)
        acc = tl.dot(e.to(v.dtype), v, acc * shrunk[:, None])
        most = new
    tl.store(out_ptr + rows[:, None] * D + d[None, :], acc / total[:, None], mask=rows[:, None] < T)


@pytest.mark.parametrize("dtype", rest(FP16, BF16, keep=FP16))
def test_attention(sm, dtype):
    T, D = 200, 64
    q, k, v = (torch.randn(T, D).to(dtype) for _ in range(3))
    out = torch.empty(T, D)
    _attention[(triton.cdiv(T, 64),)](q, k, v, out, T, D**-0.5, BLOCK=64, D=D)

    def attended(dtype):
        x = q.to(dtype) @ k.to(dtype).T * D**-0.5
        return x.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf")).softmax(1) @ v.to(
            dtype
        )

    assert_accurate(out, attended(FP64), attended(dtype), name="attention", compute_dtype=dtype)


def test_two_architectures_in_turn():
    x, w = whole_numbers(256, 64, dtype=FP16), whole_numbers(64, 128, dtype=FP16)
    for arch in (80, 90, 80):
        with ptx_executor.installed(arch):
            y = _product(x, w, (128, 128, 32), num_warps=4)
            assert set(ptx_executor.launches()[0]["mma_by_kind"]) == {KINDS[arch]}
        assert_same_bits(y, (x.double() @ w.double()).to(FP16), name="y")
