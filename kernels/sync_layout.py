"""The layout of the words (workspace.py) through which the CTAs of a launch synchronise.

    ticketed_gemm  [next ticket, CTAs that have left, stored tiles of S of row block 0, 1, …]
    strips         [finished blocks of columns, CTAs arrived at block 0, 1, …]

All are zero before a launch and after it. CTAs of ticketed_gemm leave once they need none any more.
"""

import triton
import triton.language as tl

TICKET = tl.constexpr(0)
LEFT = tl.constexpr(1)
FLAGS = tl.constexpr(2)

BLOCKS = tl.constexpr(0)
ARRIVALS = tl.constexpr(1)


@triton.jit
def leave(sync_ptr, M, BLOCK_M: tl.constexpr):
    """Count this CTA of ticketed_gemm as one that reads no more words; the last zeroes them all.

    It need not have stored its tile: what orders the next launch is the stream.
    """
    programs = tl.num_programs(0)
    if tl.atomic_add(sync_ptr + LEFT, 1, sem="release") == programs - 1:
        # The last one acquires what the others released. Were all to, S would be ordered, too, and
        # nobody would notice a flag that does not order it.
        is_last = tl.atomic_add(sync_ptr + LEFT, 0, sem="acquire") == programs
        words = FLAGS + tl.cdiv(M, BLOCK_M)
        for first in range(0, words, 128):
            offs = first + tl.arange(0, 128)
            tl.store(sync_ptr + offs, tl.zeros([128], tl.int32), mask=is_last & (offs < words))
