"""What programs of different columns made of the same rows of experts, added up in their order.

    dS[P,R] = Σ_j dS_j        dw[order[p]] = Σ_j dw_j[p] + dots[p]

order[p] is the place of row p in the routing weights [T, k]; those of rows of no expert get 0, and
dS has nothing there.
"""

import triton
import triton.language as tl

from .gated_policy import pick_sums
from .launch_plans import empty, launch
from .profile import expert_sums_name, expert_sums_work, shown_as
from .tiles import Matrix, in_units, load_tile, store_tile, unit_of

# Arguments that change from call to call: a new value must not mean a new compilation.
_VARYING = ("P", "count")


@triton.jit(do_not_specialize=_VARYING, **shown_as(expert_sums_name, expert_sums_work))
def expert_sums(
    dS_parts_ptr, dw_parts_ptr, dots_ptr, order_ptr, offsets_ptr, dS_ptr, dw_ptr, experts, count, P,
    R,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A tile of rows; UNIT: of what the rank is a multiple."""
    R = in_units(R, UNIT)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.load(offsets_ptr + experts - 1).to(tl.int32)
    if dS_ptr is not None:
        for r in tl.range(0, R, BLOCK_R, num_stages=1):
            offs_r = r + tl.arange(0, BLOCK_R)
            dS = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            for j in range(0, count):
                part = dS_parts_ptr + tl.cast(j, tl.int64) * P * R
                dS += load_tile(Matrix(part, R, 1, rows, R), offs_m, offs_r)
            store_tile(Matrix(dS_ptr, R, 1, rows, R), dS, offs_m, offs_r)
    if dw_ptr is not None:
        dw = tl.zeros([BLOCK_M], tl.float32)
        for j in range(0, count):
            part = dw_parts_ptr + tl.cast(j, tl.int64) * P
            dw += tl.load(part + offs_m, mask=offs_m < rows, other=0.0)
        if dots_ptr is not None:
            dw += tl.load(dots_ptr + offs_m, mask=offs_m < rows, other=0.0)
        places = tl.load(order_ptr + offs_m, mask=offs_m < P, other=0)
        tl.store(dw_ptr + places, dw.to(dw_ptr.dtype.element_ty), mask=offs_m < P)


def sums(offsets, order, dS_parts=None, dw_parts=None, dots=None, *, dtype=None, w=None):
    """dS [P, R] in `dtype` of its parts [J, P, R], and dw as w [T, k] is, of its parts [J, P] and
    dots [P]; None for what is not given. order [P], offsets [E]: as everywhere."""
    dS = dw = None
    given = dw_parts if dS_parts is None else dS_parts
    (count, P), R = given.shape[:2], 0
    if dS_parts is not None:
        R = dS_parts.shape[2]
        dS = empty(dS_parts, P, R, dtype=dtype)
    if dw_parts is not None:
        dw = empty(w, *w.shape)
    if P:
        config = pick_sums(R)
        launch(
            expert_sums, (-(-P // config.BLOCK_M),),
            dS_parts, dw_parts, dots, order, offsets, dS, dw, offsets.shape[0], count, P, R,
            BLOCK_M=config.BLOCK_M, BLOCK_R=config.BLOCK_L, UNIT=unit_of(R),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return dS, dw
