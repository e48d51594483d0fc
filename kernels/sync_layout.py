"""The layout of the words (workspace.py) through which the CTAs of a launch synchronise.

    ticketed_gemm  [next ticket, CTAs that left, stored tiles of S of row block 0, 1, …]
    strips         [finished blocks of columns, CTAs arrived at block 0, 1, …]

All are zero before a launch and after it. Consumers of ticketed_gemm leave once they need no more
words. By then all producers have: it is their flags that consumers wait for.
"""

import triton
import triton.language as tl

TICKET = tl.constexpr(0)
LEFT = tl.constexpr(1)
FLAGS = tl.constexpr(2)

BLOCKS = tl.constexpr(0)
ARRIVALS = tl.constexpr(1)


@triton.jit
def leave(sync_ptr, leaving, M, BLOCK_M: tl.constexpr, IS_EARLY: tl.constexpr):
    """Count this CTA of ticketed_gemm as one that needs no more words; the last of `leaving` CTAs
    zeroes them all. They need not have stored their tiles: what orders the next launch is the
    stream.
    """
    # Those that leave before they read S acquire nothing, but for the last one. Were all to, S
    # would be ordered, too, and nobody would notice a flag that does not order it.
    ORDER: tl.constexpr = "release" if IS_EARLY else "acq_rel"
    if tl.atomic_add(sync_ptr + LEFT, 1, sem=ORDER) == leaving - 1:
        is_last = True
        if IS_EARLY:
            is_last = tl.atomic_add(sync_ptr + LEFT, 0, sem="acquire") == leaving
        words = FLAGS + tl.cdiv(M, BLOCK_M)
        for first in range(0, words, 128):
            offs = first + tl.arange(0, 128)
            tl.store(sync_ptr + offs, tl.zeros([128], tl.int32), mask=is_last & (offs < words))
