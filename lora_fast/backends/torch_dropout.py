"""Dropout in the torch backend: the mask, and the three products in which it takes part.

    S = drop(x) Aᵀ     dX = drop'(dS A)     dA = dSᵀ drop(x)     drop(x) = keep ⊙ x / (1 − p)

Saved for backward is the seed, from which the mask is drawn again; drop(x) is computed for a few
rows at a time, so on a CPU it never leaves the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .torch_products import scaled_product

# Elements of drop(x) at a time on a CPU: two mebibytes in float32.
_BLOCK_ELEMENTS = 1 << 19
# Elements of a mask at a time while a CUDA graph is captured: 128 MiB of random words.
_CAPTURED_ELEMENTS = 1 << 24


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` is being captured by a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def dropout_mask(
    seed: int | Tensor, M: int, K: int, p: float, device: torch.device | str
) -> Tensor:
    """Boolean [M, K], True where an element is kept: a pure function of seed, row, column and K.

    A seed in a tensor [1] is read, for which a CPU waits; a graph that is being captured cannot,
    and draws another mask of it.

    Only the rarer outcome is drawn, which for a typical p takes a tenth of the random numbers. A
    position is hit by Poisson(λ) of Poisson(λ M K) uniform draws, independently of all others
    (Kingman 1993, Poisson Processes, §2.2), so that λ = −ln(1 − p) hits it with probability p.
    """
    device, count = torch.device(device), M * K
    if isinstance(seed, Tensor):
        if is_capturing(seed.device):
            return _mask_of_word(seed, count, p).view(M, K)
        seed = int(seed)
    rarer = min(p, 1.0 - p)
    drops = p <= 0.5
    mask = torch.full((count,), drops, dtype=torch.bool, device=device)
    host = np.random.Generator(np.random.SFC64(seed))
    draws = int(host.poisson(-math.log1p(-rarer) * count))
    if device.type == "cpu":
        dtype = np.int32 if count < 2**31 else np.int64
        mask.numpy()[host.integers(0, max(1, count), draws, dtype=dtype)] = not drops
    else:
        generator = torch.Generator(device=device).manual_seed(seed)
        hits = torch.randint(max(1, count), (draws,), device=device, generator=generator)
        mask.index_fill_(0, hits, not drops)
    return mask.view(M, K)


def _mask_of_word(seed: Tensor, count: int, p: float) -> Tensor:
    """Boolean [count] of a seed [1] that only its device reads: the outputs of splitmix64 (Steele,
    Lea and Flood 2014, Fast splittable pseudorandom number generators) are not below p."""
    mask = torch.empty(count, dtype=torch.bool, device=seed.device)
    for start in range(0, count, _CAPTURED_ELEMENTS):
        stop = min(start + _CAPTURED_ELEMENTS, count)
        # Products and sums wrap around at 64 bits.
        z = torch.arange(start + 1, stop + 1, device=seed.device).mul_(-0x61C8864680B583EB)
        z = z.add_(seed.reshape(1))
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            z = z.bitwise_xor_(_shifted(z, shift)).mul_(factor)
        z = z.bitwise_xor_(_shifted(z, 31))
        torch.ge(_shifted(z, 11), round(p * 2**53), out=mask[start:stop])
    return mask


def _shifted(z: Tensor, bits: int) -> Tensor:
    """z >> bits without its sign."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


@dataclass(frozen=True, eq=False)
class Dropout:
    """A mask [M, K] and the probability p that it was drawn with."""

    mask: Tensor
    p: float

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.p) if self.p < 1.0 else 0.0

    def shrink(self, x: Tensor, A: Tensor) -> Tensor:
        """drop(x) Aᵀ [M, R] for x [M, K] and A [R, K]."""
        S = x.new_empty(x.shape[0], A.shape[0])
        for rows, kept in self.kept(x):
            scaled_product(kept, A.T, self.keep_scale, out=S[rows])
        return S

    def input_gradient(self, dS: Tensor, A: Tensor) -> Tensor:
        """drop'(dS A) [M, K] for dS [M, R] and A [R, K]."""
        dX = dS.new_empty(dS.shape[0], A.shape[1])
        for rows, keep in self._blocks(dX):
            scaled_product(dS[rows], A, self.keep_scale, out=dX[rows])
            dX[rows].mul_(keep)
        return dX

    def kept(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """keep ⊙ x, not scaled, in blocks of rows; the next block overwrites the last."""
        for rows, keep in self._blocks(x):
            yield rows, keep.mul_(x[rows])

    def _blocks(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The mask as numbers of x's dtype, a few rows at a time in one buffer."""
        M, K = x.shape
        # Bytes become floats several times faster than booleans do.
        bytes_ = self.mask.view(torch.uint8)
        step = max(1, _BLOCK_ELEMENTS // K) if x.device.type == "cpu" else max(1, M)
        buffer = x.new_empty(min(step, M), K)
        for start in range(0, M, step):
            rows = slice(start, min(start + step, M))
            yield rows, buffer[: rows.stop - start].copy_(bytes_[rows])
