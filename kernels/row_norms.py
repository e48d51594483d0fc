"""The norms that DoRA divides by, in one read of W and without an N × K product in memory.

    norms[N] = ‖W_i[K] + s · B_i[R] A[R,K]‖₂ of every row i                                (float32)

One launch. Nothing is cached between calls, since a write to W, A or B may leave no trace.
"""

import torch
import triton
import triton.language as tl

from .environment import precision_of
from .launch_policy import pick_row_norms
from .profile import norms_name, norms_work, shown_as
from .tiles import Matrix, in_units, load_tile, unit_of


@triton.jit(**shown_as(norms_name, norms_work))
def row_norms(
    w_ptr, A_ptr, B_ptr, norms_ptr, scaling, N, K, R, stride_wn, stride_wk,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """The norms of BLOCK_N rows; UNIT: of what the rank is a multiple."""
    R = in_units(R, UNIT)
    dtype = w_ptr.dtype.element_ty
    w_mat = Matrix(w_ptr, stride_wn, stride_wk, N, K)
    A_mat, B_mat = Matrix(A_ptr, K, 1, R, K), Matrix(B_ptr, R, 1, N, R)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        delta = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for r in range(0, R, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            B = load_tile(B_mat, offs_n, offs_r).to(dtype)
            A = load_tile(A_mat, offs_r, offs_k).to(dtype)
            delta = tl.dot(B, A, delta, input_precision=PRECISION)
        w = load_tile(w_mat, offs_n, offs_k).to(tl.float32)
        row = w + delta * tl.cast(scaling, tl.float32)
        total += tl.sum(row * row, axis=1)
    tl.store(norms_ptr + offs_n, tl.sqrt(total), mask=offs_n < N)


def norms_of(W, A, B, scaling):
    """norms [N] of dense W [N, K], A [R, K] and B [N, R]."""
    A, B = A.contiguous(), B.contiguous()
    (N, K), R = W.shape, A.shape[0]
    norms = torch.empty(N, dtype=torch.float32, device=W.device)
    config = pick_row_norms(R, W.dtype)
    row_norms[(triton.cdiv(N, config.BLOCK_N),)](
        W, A, B, norms, scaling, N, K, R, *W.stride(),
        BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, BLOCK_R=config.BLOCK_R,
        PRECISION=precision_of(W.dtype), UNIT=unit_of(R), num_warps=config.num_warps,
        num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return norms
