"""The dropout mask: a pure function of seed, row and column, regenerated wherever it is needed."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Dropout:
    """Probability p and seed of the mask; p = 0 is no dropout."""

    p: float = 0.0
    seed: int = 0

    @property
    def keep_scale(self):
        """1 / (1 − p); 0 where nothing is kept."""
        return 1.0 / (1.0 - self.p) if self.p < 1.0 else 0.0

    def words(self):
        """seed (low, high) and threshold p · 2³², each as the int32 with those bits."""
        threshold = min(round(self.p * 2**32), 2**32 - 1)
        return [_as_int32(word) for word in (self.seed, self.seed >> 32, threshold)]


def _as_int32(word):
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


@triton.jit
def keep_mask(seed_low, seed_high, threshold, offs_m, first_l, BLOCK_L: tl.constexpr):
    """True where dropout keeps element (m, l): word l % 4 of Philox(seed, m, l // 4) ≥ threshold.

    threshold is p · 2³² as an unsigned integer. first_l must be a multiple of 4. The mask does not
    depend on how the matrix is cut into tiles.
    """
    quads = first_l // 4 + tl.arange(0, BLOCK_L // 4)
    rows = offs_m[:, None] + tl.zeros([1, BLOCK_L // 4], tl.int32)
    columns = quads[None, :] + tl.zeros([offs_m.shape[0], 1], tl.int32)
    zero = tl.zeros_like(rows)
    seed = (tl.cast(seed_high, tl.int64) << 32) | (tl.cast(seed_low, tl.int64) & 0xFFFFFFFF)
    w0, w1, w2, w3 = tl.philox(seed, rows, columns, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(offs_m.shape[0], BLOCK_L)
    return words >= tl.cast(threshold, tl.uint32)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])
def store_keep_mask(
    mask_ptr, seed_low, seed_high, threshold, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One tile of the mask [M, K] as bytes, for those who want to see it."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = tl.program_id(1) * BLOCK_K
    offs_k = first_k + tl.arange(0, BLOCK_K)
    keep = keep_mask(seed_low, seed_high, threshold, offs_m, first_k, BLOCK_K)
    inside = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    offs = offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(mask_ptr + offs, keep.to(tl.int8), mask=inside)


def dropout_mask(M, K, dropout, device):
    """The boolean keep-mask [M, K] that the kernels apply to x."""
    mask = torch.empty((M, K), dtype=torch.int8, device=device)
    if mask.numel():
        grid = (triton.cdiv(M, 32), triton.cdiv(K, 64))
        store_keep_mask[grid](mask, *dropout.words(), M, K, BLOCK_M=32, BLOCK_K=64)
    return mask.bool()
