"""Kernels for the tests of the PTX executor: small Triton kernels, and PTX written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from tests.ptx_executor import LaunchCounts, Options
from tests.ptx_executor.counts import Counts, of_launch
from tests.ptx_executor.launching.parameters import Parameters
from tests.ptx_executor.machine.grid import run_grid
from tests.ptx_executor.machine.state import Launch
from tests.ptx_executor.memory.global_memory import GlobalMemory
from tests.ptx_executor.ptx.parser import parse
from tests.ptx_executor.translation.program import Program

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TF32_PRODUCTS = FP16  # for accuracy.py: tf32 has float16's mantissa


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out = x + y"""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x, y = tl.load(x_ptr + offs, mask=mask), tl.load(y_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, x + y, mask=mask)


@triton.jit
def softmax(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Of every row."""
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + offs, mask=offs < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * n + offs, e / tl.sum(e, 0), mask=offs < n)


@triton.jit
def dot(x_ptr, w_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr):
    """y = x wᵀ in one tl.dot."""
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    x, w = tl.load(x_ptr + m * K + k[None, :]), tl.load(w_ptr + n * K + k[:, None])
    tl.store(y_ptr + m * N + n, tl.dot(x, w, out_dtype=OUT))


@triton.jit
def gemm(
    x_ptr, w_ptr, y_ptr, M, N, K,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[M, N] = x[M, K] w[K, N]"""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        row, column = (k + offs_k)[None, :], (k + offs_k)[:, None]
        x = tl.load(x_ptr + offs_m * K + row, mask=(offs_m < M) & (row < K), other=0.0)
        w = tl.load(w_ptr + column * N + offs_n, mask=(column < K) & (offs_n < N), other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    mask = (offs_m < M) & (offs_n < N)
    tl.store(y_ptr + offs_m * N + offs_n, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def lora(
    x_ptr, w_ptr, a_ptr, b_ptr, y_ptr, M, N, K, scaling,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x wᵀ + scaling · (x aᵀ) bᵀ, both products in one loop."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, R)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    low = tl.zeros((BLOCK_M, R), tl.float32)
    mask_m, mask_n = offs_m < M, offs_n < N
    for k in range(0, K, BLOCK_K):
        row, column = (k + offs_k)[None, :], (k + offs_k)[:, None]
        x = tl.load(x_ptr + offs_m * K + row, mask=mask_m & (row < K), other=0.0)
        w = tl.load(w_ptr + offs_n * K + column, mask=mask_n & (column < K), other=0.0)
        a = tl.load(a_ptr + offs_r[None, :] * K + column, mask=column < K, other=0.0)
        acc = tl.dot(x, w, acc)
        low = tl.dot(x, a, low)
    b = tl.load(b_ptr + offs_n * R + offs_r[:, None], mask=mask_n, other=0.0)
    acc += scaling * tl.dot(low.to(b.dtype), b)
    tl.store(y_ptr + offs_m * N + offs_n, acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)


@triton.jit
def described_gemm(
    x_desc, w_desc, y_desc, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """y = x wᵀ, one tile for each program, by tensor descriptors."""
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K, warp_specialize=SPECIALIZE):
        acc = tl.dot(x_desc.load([m, k]), w_desc.load([n, k]).T, acc)
    y_desc.store([m, n], acc.to(tl.bfloat16))


@triton.jit
def persistent_gemm(
    x_desc, w_desc, y_desc, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """The same, many tiles for each program."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), rows * columns, tl.num_programs(0),
        warp_specialize=SPECIALIZE, flatten=True,
    ):  # fmt: skip
        m, n = tile % rows * BLOCK_M, tile // rows * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(x_desc.load([m, k]), w_desc.load([n, k]).T, acc)
        y_desc.store([m, n], acc.to(tl.bfloat16))


def whole_numbers(*shape: int, dtype: torch.dtype = BF16, most: int = 3) -> torch.Tensor:
    """Random integers, whose sums and products are exact: results are compared bit for bit."""
    return torch.randint(-most, most + 1, shape).to(dtype)


def descriptors(*tensors_and_blocks: tuple[torch.Tensor, list[int]]) -> list[Any]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return [TensorDescriptor.from_tensor(tensor, block) for tensor, block in tensors_and_blocks]


def execute(
    text: str,
    arrays: dict[str, np.ndarray],
    *,
    threads: int,
    ctas: int = 1,
    shared: int = 0,
    **options: Any,
) -> LaunchCounts:
    """Run the only kernel of a PTX text, whose parameters are pointers to these arrays."""
    (kernel,) = parse(text).kernels.values()
    program, opts = Program(kernel, shared), Options(**options)
    memory = GlobalMemory(race=opts.check_global_race, granule=program.global_granule)
    for name, array in arrays.items():
        memory.add(array.ctypes.data, array.nbytes, name)
    pointers = [("ptr", array.ctypes.data) for array in arrays.values()]
    params = Parameters(program, pointers, memory)
    launch = Launch(program, (ctas, 1, 1), threads, memory, params, opts, Counts())
    run_grid(launch)
    return of_launch(launch, arch=80, seconds=0.0)
