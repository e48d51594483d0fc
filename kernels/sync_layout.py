"""The layout of the words (workspace.py) through which the CTAs of a launch synchronise.

    ticketed_gemm  [next ticket, finished CTAs, stored tiles of S of row block 0, 1, …]
    strips         [finished blocks of columns, CTAs arrived at block 0, 1, …]

All are zero before a launch and after it.
"""

import triton.language as tl

TICKET = tl.constexpr(0)
FINISHED = tl.constexpr(1)
FLAGS = tl.constexpr(2)

BLOCKS = tl.constexpr(0)
ARRIVALS = tl.constexpr(1)
