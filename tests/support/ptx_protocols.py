"""Kernels whose programs wait for one another: flags, locks, barriers over the grid."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from ptx_kernels import BF16, whole_numbers

from bench.instruments.accuracy import assert_same_bits
from tests import ptx_executor


@triton.jit
def _produced_and_consumed(
    x_ptr, w_ptr, a_ptr, b_ptr, low_ptr, y_ptr, ticket_ptr, flag_ptr, M, N, K, scaling,
    TICKET: tl.constexpr, BARRIER: tl.constexpr, RELEASE: tl.constexpr, ACQUIRE: tl.constexpr,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x wᵀ + low bᵀ; some programs make low = scaling · x aᵀ, others wait for rows of it."""
    turn = tl.atomic_add(ticket_ptr, 1, sem="relaxed") if TICKET else tl.program_id(0)
    rows = tl.cdiv(M, BLOCK_M)
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, R)
    if turn < rows:
        offs_m = turn * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        low = tl.zeros((BLOCK_M, R), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = tl.load(x_ptr + offs_m * K + (k + offs_k)[None, :], mask=offs_m < M, other=0.0)
            a = tl.load(a_ptr + offs_r[None, :] * K + (k + offs_k)[:, None])
            low = tl.dot(x, a, low)
        stored = (low * scaling).to(low_ptr.dtype.element_ty)
        tl.store(low_ptr + offs_m * R + offs_r[None, :], stored, mask=offs_m < M)
        if BARRIER:
            tl.debug_barrier()
        tl.atomic_add(flag_ptr + turn, 1, sem=RELEASE)
    else:
        tile = turn - rows
        row = tile % rows
        offs_m = row * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        offs_n = tile // rows * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = tl.load(x_ptr + offs_m * K + (k + offs_k)[None, :], mask=offs_m < M, other=0.0)
            acc = tl.dot(x, tl.load(w_ptr + offs_n * K + (k + offs_k)[:, None]), acc)
        b = tl.load(b_ptr + offs_n * R + offs_r[:, None])
        while tl.atomic_add(flag_ptr + row, 0, sem=ACQUIRE) == 0:
            pass
        made = tl.load(low_ptr + offs_m * R + offs_r[None, :], mask=offs_m < M, other=0.0)
        acc = tl.dot(made, b, acc)
        tl.store(y_ptr + offs_m * N + offs_n, acc.to(y_ptr.dtype.element_ty), mask=offs_m < M)


def run_produced_and_consumed(
    arch: int,
    *,
    ticket: bool = True,
    barrier: bool = True,
    release: str = "release",
    acquire: str = "acquire",
    warps: int = 4,
    dtype: torch.dtype = BF16,
    **options: Any,
) -> None:
    """Run it and compare the result. What the executor raises."""
    M, N, K, R, block = 140, 128, 128, 16, 64
    sizes = ((M, K), (N, K), (R, K), (N, R))
    x, w, a, b = (whole_numbers(*size, dtype=dtype, most=2) for size in sizes)
    low, y = (torch.full(size, float("nan"), dtype=dtype) for size in ((M, R), (M, N)))
    tickets, flags = torch.zeros(1, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    rows = triton.cdiv(M, block)
    with ptx_executor.installed(arch, check_global_race=True, **options):
        _produced_and_consumed[(rows + rows * (N // block),)](
            x, w, a, b, low, y, tickets, flags, M, N, K, 0.5,
            TICKET=ticket, BARRIER=barrier, RELEASE=release, ACQUIRE=acquire,
            R=R, BLOCK_M=block, BLOCK_N=block, BLOCK_K=block, num_warps=warps,
        )  # fmt: skip
    rounded = (0.5 * (x.double() @ a.double().T)).to(dtype).double()
    expected = x.double() @ w.double().T + rounded @ b.double().T
    assert_same_bits(y, expected.to(dtype), name="y")


@triton.jit
def _all_meet(x_ptr, y_ptr, z_ptr, count_ptr, n, SEM: tl.constexpr, BLOCK: tl.constexpr):
    """Two phases with a barrier over the grid: x reversed into y, then x is written."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + n - 1 - offs, tl.load(x_ptr + offs))
    tl.debug_barrier()
    tl.atomic_add(count_ptr, 1, sem=SEM)
    while tl.atomic_add(count_ptr, 0, sem=SEM) < tl.num_programs(0):
        pass
    y = tl.load(y_ptr + offs)
    tl.store(z_ptr + offs, y)
    tl.store(x_ptr + n - 1 - offs, y + 1)


def run_all_meet(sem: str = "acq_rel") -> None:
    """Run it on four programs and compare the results."""
    n, block = 1024, 256
    x, y, z = torch.arange(n, dtype=torch.float32), torch.zeros(n), torch.zeros(n)
    _all_meet[(n // block,)](x, y, z, torch.zeros(1, dtype=torch.int32), n, SEM=sem, BLOCK=block)
    expected = torch.arange(n, dtype=torch.float32).flip(0)
    assert torch.equal(z, expected) and torch.equal(x.flip(0), expected + 1)


@triton.jit
def _locked_sum(x_ptr, total_ptr, lock_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.sum(tl.load(x_ptr + offs, mask=offs < n, other=0.0), 0)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(total_ptr, tl.load(total_ptr) + part)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


def run_locked_sum() -> None:
    """Run it on six programs and compare the sum."""
    x = whole_numbers(1500, dtype=torch.float32)
    total, lock = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    _locked_sum[(6,)](x, total, lock, 1500, BLOCK=256)
    assert total.item() == x.sum().item() and lock.item() == 0
