"""The dropout mask: a pure function of seed, row and column, regenerated where it is needed.

Element (m, l) has 15 random bits, the lower ones of half l % 2 of word l % 8 // 2 of
Philox4x32(seed, m, l // 8): drawing them is the cost of a mask, so one call serves eight neighbours
of a row. So p is a multiple of 2⁻¹⁵, and the elements that survive are scaled by 1 / (1 − p) of
that p, which preserves expectations.

Philox has 7 rounds here: with as many it passes all tests of BigCrush, and 10, the usual number,
are a margin of safety (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011).

The seed is a number, or one of 64 bits in memory, which a captured CUDA graph draws anew at each
replay: a kernel reads it once, where it first drops.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import triton_version  # noqa: F401
from .profile import mask_name, mask_work, shown_as

_ROUNDS = tl.constexpr(7)
# Two elements of 16 bits in $1, a word in $2, the threshold in both halves of $3. A half becomes
# its 15 bits + 2¹⁵ − threshold: it borrows nothing from its neighbour, and its sign tells; prmt
# makes a mask of that.
_DROP_PAIR = tl.constexpr(
    "{\n.reg .b32 m;\n"
    "or.b32 m, $2, 0x80008000;\n"
    "sub.u32 m, m, $3;\n"
    "prmt.b32 m, m, 0, 0xbb99;\n"
    "and.b32 $0, $1, m;\n}"
)


@dataclass(frozen=True)
class Dropout:
    """Probability p and seed of the mask; p = 0 is no dropout, 1 drops everything.

    Between them p is rounded to one of 1, 2, … 32767 in 32768. The seed is a number or an int64
    tensor of one element on the device, which stands for the number in it.
    """

    p: float = 0.0
    seed: int | torch.Tensor = 0

    @functools.cached_property
    def dropped(self):
        """Of the 32768 values of an element's random bits, the first that keeps it."""
        if self.p <= 0.0 or self.p >= 1.0:
            return 32768 * int(self.p >= 1.0)
        return min(max(round(self.p * 32768), 1), 32767)

    @property
    def drawn(self):
        """p as it is drawn."""
        return self.dropped / 32768

    @functools.cached_property
    def keep_scale(self):
        """1 / (1 − p) for p as it is drawn; 0 where nothing is kept."""
        return 1.0 / (1.0 - self.drawn) if self.drawn < 1.0 else 0.0

    def words(self):
        """The tensor that holds the seed or None, the seed (low, high), each as the int32 with
        those bits, and the threshold."""
        if isinstance(self.seed, torch.Tensor):
            return [self.seed, 0, 0, self.dropped]
        return [None, _as_int32(self.seed), _as_int32(self.seed >> 32), self.dropped]


NO_DROPOUT = Dropout()


class Words(NamedTuple):
    """What a kernel draws the mask from (Dropout.words), and by what it multiplies the rest."""

    seed_ptr: Any
    seed_low: Any
    seed_high: Any
    threshold: Any
    keep_scale: Any = 1.0


def drops_pairs(dtype, arch):
    """Whether `drop` may take PAIRS: elements of 16 bits, on an NVIDIA GPU."""
    return dtype.itemsize == 2 and arch is not None


def _as_int32(word):
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


@triton.jit
def seed_of(words):
    """The seed (low, high), read from memory where it lies there."""
    if words.seed_ptr is None:
        return words.seed_low, words.seed_high
    else:
        seed = tl.load(words.seed_ptr)
        return seed.to(tl.int32), (seed >> 32).to(tl.int32)


@triton.jit
def _multiply(a: tl.constexpr, b):
    """The high and the low word of a product of 64 bits, which is one instruction."""
    product = b.to(tl.uint64) * a
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _random_words(seed, offs_m, first_l, BLOCK_L: tl.constexpr):
    """Philox's words for a tile, [BLOCK_M, BLOCK_L / 8, 2, 2]: each serves two neighbours."""
    octets = (first_l // 8 + tl.arange(0, BLOCK_L // 8)).to(tl.uint32, bitcast=True)
    c0 = offs_m.to(tl.uint32, bitcast=True)[:, None] + tl.zeros([1, BLOCK_L // 8], tl.uint32)
    c1 = octets[None, :] + tl.zeros_like(c0)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    k0, k1 = tl.cast(seed[0], tl.uint32), tl.cast(seed[1], tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high_0, low_0 = _multiply(0xD2511F53, c0)
        high_2, low_2 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return tl.join(tl.join(c0, c2), tl.join(c1, c3))


@triton.jit
def keep_mask(words, seed, offs_m, first_l, BLOCK_L: tl.constexpr):
    """True where dropout keeps element (m, l): where its 15 bits are not below the threshold.

    The seed is `seed_of(words)`, which a kernel reads once. first_l must be a multiple of 8. The
    mask does not depend on how the matrix is cut into tiles.
    """
    random = _random_words(seed, offs_m, first_l, BLOCK_L)
    # With − 1 a threshold of 2¹⁵, too, fits 32 bits.
    limit = (tl.cast(words.threshold, tl.uint32) << 17) - 1
    return tl.join(random << 17 > limit, random << 1 > limit).reshape(offs_m.shape[0], BLOCK_L)


@triton.jit
def drop(x, words, seed, offs_m, first_l, BLOCK_L: tl.constexpr, PAIRS: tl.constexpr):
    """The tile x, zero where dropout does not keep it; PAIRS: two elements of 16 bits at once."""
    if PAIRS:
        random = _random_words(seed, offs_m, first_l, BLOCK_L)
        halves = tl.join(random.to(tl.uint16), (random >> 16).to(tl.uint16))
        halves = halves.reshape(offs_m.shape[0], BLOCK_L)
        thresholds = tl.cast(words.threshold, tl.uint32) * 0x10001
        return tl.inline_asm_elementwise(
            _DROP_PAIR, "=r,r,r,r,r", [x, halves, thresholds], x.dtype, True, 2
        )
    else:
        keep = keep_mask(words, seed, offs_m, first_l, BLOCK_L)
        return tl.where(keep, x, 0.0)


_VARYING = ("seed_low", "seed_high", "threshold")


@triton.jit(do_not_specialize=_VARYING, **shown_as(mask_name, mask_work))
def store_keep_mask(
    mask_ptr, seed_ptr, seed_low, seed_high, threshold, M, K,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the mask [M, K] as bytes, for those who want to see it."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = tl.program_id(1) * BLOCK_K
    offs_k = first_k + tl.arange(0, BLOCK_K)
    words = Words(seed_ptr, seed_low, seed_high, threshold)
    keep = keep_mask(words, seed_of(words), offs_m, first_k, BLOCK_K)
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
