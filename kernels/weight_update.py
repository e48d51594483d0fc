"""One pass over a dense weight: add a low-rank product, apply a gain, round once.

    out[N,K] = round( g[N] ⊙ (W[N,K] + s · (b[N] ⊙ (B[N,R] d[R])) A[R,K]) )

out may be W itself: every tile is read and written by one program. Products and sums are float32
(IEEE) whatever the dtypes of W and of the factors, so the only error of note is the rounding to
out's dtype. That matters for 16-bit weights, too: a delta of two products that nearly cancel, as
Delta-LoRA adds, is lost when the factors are rounded to 16 bits.
"""

import triton
import triton.language as tl

from .launch_policy import UPDATE
from .profile import shown_as, update_name, update_work
from .tiles import (
    Matrix,
    factor_unit,
    in_units,
    load_factor,
    load_tile,
    load_vector,
    store_tile,
    unit_of,
)


@triton.jit(**shown_as(update_name, update_work))
def weight_update(
    w_ptr, out_ptr, A_ptr, B_ptr, gains, scaling, N, K, R,
    stride_wn, stride_wk, stride_on, stride_ok, stride_ar, stride_ak, stride_bn, stride_br,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, UNIT: tl.constexpr,
    FACTOR_UNIT: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_N, BLOCK_K] of out; without A and B only the gain. UNIT and FACTOR_UNIT: of
    what the rank and the rows of B are multiples."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    offs_n = (tl.program_id(0) // blocks_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = (tl.program_id(0) % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if A_ptr is not None:
        R, stride_bn = in_units(R, UNIT), in_units(stride_bn, FACTOR_UNIT)
        A_mat = Matrix(A_ptr, stride_ar, stride_ak, R, K)
        B_mat = Matrix(B_ptr, stride_bn, stride_br, N, R)
        for r in range(0, R, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            B = load_factor(B_mat, gains, 1.0, offs_n, offs_r, True, tl.float32)
            A = load_tile(A_mat, offs_r, offs_k).to(tl.float32)
            acc = tl.dot(B, A, acc, input_precision="ieee")
        acc *= tl.cast(scaling, tl.float32)
    acc += load_tile(Matrix(w_ptr, stride_wn, stride_wk, N, K), offs_n, offs_k).to(tl.float32)
    if gains.g is not None:
        acc *= load_vector(gains.g, offs_n, N)[:, None]
    store_tile(Matrix(out_ptr, stride_on, stride_ok, N, K), acc, offs_n, offs_k)


def update(W, out, A, B, gains, scaling):
    """Fill out [N, K], which may be W, in one launch; A and B, or any of the gains, may be None."""
    (N, K), config = W.shape, UPDATE
    R = 0 if A is None else A.shape[0]
    strides_A, strides_B = (0, 0) if A is None else A.stride(), (0, 0) if B is None else B.stride()
    if W.numel() == 0:
        return
    weight_update[(triton.cdiv(N, config.BLOCK_N) * triton.cdiv(K, config.BLOCK_K),)](
        W, out, A, B, gains, scaling, N, K, R,
        *W.stride(), *out.stride(), *strides_A, *strides_B,
        BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, BLOCK_R=config.BLOCK_R, UNIT=unit_of(R),
        FACTOR_UNIT=1 if B is None else factor_unit(B),
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
