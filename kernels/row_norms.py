"""The norms that DoRA divides by, in one read of W and without an N × K product in memory.

    norms[N] = ‖W_i[K] + s · B_i[R] A[R,K]‖₂ of every row i                                (float32)

Two launches. The first compares A and B with copies of themselves from the last call, bit by bit,
renews the copies and leaves the number of this call in `changed` if they differ. The second returns
at once where they do not. So a call costs little while nothing changed (gradient accumulation,
inference), nothing is ever waited for, and no write can be missed, whoever made it.
"""

import torch
import triton
import triton.language as tl

from .configs import pick_row_norms, precision_of
from .tiles import load_tile

_COMPARED = 4096


@triton.jit
def _renew(ptr, copy_ptr, count, changed_ptr, call, block, COMPARED: tl.constexpr):
    offs = block * COMPARED + tl.arange(0, COMPARED)
    mask = offs < count
    now = tl.load(ptr + offs, mask=mask, other=0)
    before = tl.load(copy_ptr + offs, mask=mask, other=0)
    tl.store(copy_ptr + offs, now, mask=mask)
    if tl.max((now != before).to(tl.int32), 0) > 0:
        tl.atomic_max(changed_ptr, call, sem="relaxed")


@triton.jit(do_not_specialize=["call"])
def mark_changes(
    A_ptr, A_copy_ptr, B_ptr, B_copy_ptr, changed_ptr, call, count_A, count_B, blocks_A,
    COMPARED: tl.constexpr,
):  # fmt: skip
    """COMPARED words of A, or of B; all of them flat, as integers."""
    block = tl.program_id(0).to(tl.int64)
    if block < blocks_A:
        _renew(A_ptr, A_copy_ptr, count_A, changed_ptr, call, block, COMPARED)
    else:
        _renew(B_ptr, B_copy_ptr, count_B, changed_ptr, call, block - blocks_A, COMPARED)


@triton.jit(do_not_specialize=["call"])
def row_norms(
    w_ptr, A_ptr, B_ptr, norms_ptr, changed_ptr, call, scaling, N, K, R, stride_wn, stride_wk,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The norms of BLOCK_N rows, if this call found A or B changed."""
    if tl.load(changed_ptr) == call:
        dtype = w_ptr.dtype.element_ty
        offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            delta = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            for r in range(0, R, BLOCK_R):
                offs_r = r + tl.arange(0, BLOCK_R)
                B = load_tile(B_ptr, offs_n, offs_r, R, 1, N, R).to(dtype)
                A = load_tile(A_ptr, offs_r, offs_k, K, 1, R, K).to(dtype)
                delta = tl.dot(B, A, delta, input_precision=PRECISION)
            w = load_tile(w_ptr, offs_n, offs_k, stride_wn, stride_wk, N, K).to(tl.float32)
            row = w + delta * tl.cast(scaling, tl.float32)
            total += tl.sum(row * row, axis=1)
        tl.store(norms_ptr + offs_n, tl.sqrt(total), mask=offs_n < N)


class State:
    """The norms of one weight, and the A, B and s that they belong to."""

    def __init__(self, A, B, scaling, N):
        self.A, self.B, self.scaling = torch.empty_like(A), torch.empty_like(B), scaling
        self.norms = torch.empty(N, dtype=torch.float32, device=A.device)
        self.changed = torch.zeros(1, dtype=torch.int32, device=A.device)
        self.calls = 0

    def fits(self, A, B, scaling):
        """Whether A and B can be compared with the copies, and s is the same."""
        pairs = ((self.A, A), (self.B, B))
        return self.scaling == scaling and all(
            (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
            for old, new in pairs
        )


def norms_of(weight, A, B, scaling, state):
    """norms [N] of this moment in a tensor of its own, and the state for the next call.

    weight() gives W [N, K], dense; it is called only where the norms may have to be computed.
    """
    A, B = A.contiguous(), B.contiguous()
    known = state is not None and state.fits(A, B, scaling)
    state = state if known else State(A, B, scaling, B.shape[0])
    state.calls += 1
    blocks = [triton.cdiv(factor.numel(), _COMPARED) for factor in (A, B)]
    mark_changes[(sum(blocks),)](
        _bits(A), _bits(state.A), _bits(B), _bits(state.B), state.changed, state.calls,
        A.numel(), B.numel(), blocks[0], COMPARED=_COMPARED,
        enable_fp_fusion=True,
    )  # fmt: skip
    W = weight()
    (N, K), R = W.shape, A.shape[0]
    config = pick_row_norms(R, W.dtype)
    if not known:
        # What the copies held before is undefined, and may by chance be equal.
        state.changed.fill_(state.calls)
    row_norms[(triton.cdiv(N, config.BLOCK_N),)](
        W, A, B, state.norms, state.changed, state.calls, scaling, N, K, R, *W.stride(),
        BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, BLOCK_R=config.BLOCK_R,
        PRECISION=precision_of(W.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return state.norms.clone(), state


def _bits(factor):
    return factor.view(torch.int16 if factor.element_size() == 2 else torch.int32)
