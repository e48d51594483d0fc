"""FLOPs and bytes of the kernels of a gated MLP, from the arguments of a launch."""

from __future__ import annotations

from typing import Any

import torch

from .passes import Pass, Values, cdiv, names

_BRANCH = "base_ptr s_ptr B_ptr scaling R stride_base stride_s stride_bl stride_br"
_CONSTANTS = (
    "ACTIVATION DROPOUT BLOCK_M BLOCK_L BLOCK_R BLOCK_E ONE_STEP EIGHTS PRECISION PAIRS SETTLES "
    "SHUFFLES MMA_SYNC keep_scale seed_ptr seed_low seed_high threshold M L "
)
_BRANCHES = " ".join(f"{name}.{field}" for name in ("gate", "up") for field in _BRANCH.split())

_FORWARD_ARGUMENTS = names(
    f"{_BRANCHES} {_CONSTANTS} A_ptr h_ptr parts_ptr s_ptr wide_ptr sync_ptr R tiles ranges padded "
    "stride_hm stride_ar stride_al IN_CHUNKS"
)


def _branches(count: Pass, v: Values, column_tiles: int, row_tiles: int) -> None:
    """gate and up once each, and S · Qᵀ of every tile."""
    M, L = v["M"], v["L"]
    for name in ("gate", "up"):
        base, R = M * L * v.itemsize(f"{name}.base_ptr"), v[f"{name}.R"]
        count.reads(f"{name}.base_ptr", base, base)
        if v[f"{name}.s_ptr"] is not None:
            count.flops += 2 * M * L * R
            _narrow(count, v, f"{name}.s_ptr", R, column_tiles)
            _factor(count, v, f"{name}.B_ptr", R, row_tiles)


def _narrow(count: Pass, v: Values, name: str, R: int, column_tiles: int) -> None:
    """Rows of S, or dS, for every tile of columns."""
    narrow = v["M"] * R * v.itemsize(name)
    count.reads(name, narrow, column_tiles * narrow)


def _factor(count: Pass, v: Values, name: str, R: int, row_tiles: int) -> None:
    """B, or A, for every tile of rows."""
    factor = v["L"] * R * v.itemsize(name)
    count.reads(name, factor, row_tiles * factor)


def _gated_forward(v: Values, grid: tuple[int, int, int]) -> list[Pass]:
    M, L, R = v["M"], v["L"], v["R"]
    column_tiles, row_tiles = cdiv(L, v["BLOCK_L"]), cdiv(M, v["BLOCK_M"])
    forward, e = Pass("activation"), v.itemsize("h_ptr")
    _branches(forward, v, column_tiles, row_tiles)
    # The ends of wide rows are memory of h.
    wide = v["padded"] if v["wide_ptr"] is not None else 0
    forward.writes("h_ptr", M * (L + wide) * e)
    if v["A_ptr"] is None:
        return [forward]
    forward.flops += 2 * M * L * R
    _factor(forward, v, "A_ptr", R, row_tiles)
    part, ranges = 4 * M * R, v["ranges"]
    # In chunks of the rank every tile of columns adds to what the one before it stored.
    stored = column_tiles if v["IN_CHUNKS"] else ranges
    forward.reads("parts_ptr", ranges * part, stored * part)
    forward.written["parts_ptr"] += ranges * part
    forward.stored["parts_ptr"] += stored * part
    if v["s_ptr"] is not None:
        forward.writes("s_ptr", M * R * e)
    return [forward]


_SUMS = "T_ptr grad_ptr dS_ptr stride_l stride_r"
_DOWN = "dS_ptr largest_ptr A_ptr R stride_dS stride_ar stride_al"
_BACKWARD_ARGUMENTS = names(
    f"{_BRANCHES} {_CONSTANTS} dh_ptr dgate_ptr dup_ptr sync_ptr rows_per_range ranges tile_rows "
    "stride_dh stride_dgate stride_dup PARTS "
    + " ".join(f"down.{field}" for field in _DOWN.split())
    + " "
    + " ".join(f"{m}_sums.{field}" for m in ("gate", "up", "down") for field in _SUMS.split())
)


def _gated_backward(v: Values, grid: tuple[int, int, int]) -> list[Pass]:
    M, L, (blocks, ranges, _) = v["M"], v["L"], grid
    row_tiles = cdiv(M, v["BLOCK_M"])
    walk = Pass("activation")
    _branches(walk, v, blocks * v["PARTS"], row_tiles)
    _through_down(walk, v, blocks * v["PARTS"], row_tiles)
    if v["dh_ptr"].dtype == torch.float16:
        _scales(walk, v, blocks, row_tiles, ranges)
    for name, R in (("gate", v["gate.R"]), ("up", v["up.R"]), ("down", v["down.R"])):
        if v[f"{name}_sums.T_ptr"] is not None:
            T = ranges * L * R * 4
            walk.flops += 2 * M * L * R
            walk.reads(f"{name}_sums.T_ptr", T, T)
            walk.writes(f"{name}_sums.T_ptr", T)
            walk.writes(f"{name}_sums.grad_ptr", L * R * v.itemsize(f"{name}_sums.grad_ptr"))
        if v[f"{name}_sums.dS_ptr"] is not None:
            walk.flops += 2 * M * L * R
            walk.writes(f"{name}_sums.dS_ptr", blocks * M * R * 4)
    return [walk]


def _scales(walk: Pass, v: Values, blocks: int, row_tiles: int, ranges: int) -> None:
    """Operands that are scaled by columns are read again, and what their scales come from."""
    _largest(walk, v, v["rows_per_range"], blocks)
    if v["down_sums.T_ptr"] is not None:
        again = blocks * v["PARTS"] * v["M"] * v["down.R"] * v.itemsize("down.dS_ptr")
        walk.reads("down.dS_ptr", 0, again)
        walk.loaded["down.largest_ptr"] *= 2
    for name in ("gate", "up"):
        if v[f"{name}_sums.dS_ptr"] is not None:
            factor = v["L"] * v[f"{name}.R"] * v.itemsize(f"{name}.B_ptr")
            walk.reads(f"{name}.B_ptr", 0, (ranges + row_tiles) * factor)


def _largest(count: Pass, v: Values, rows: int, columns: int) -> None:
    """The largest of dS of every so many rows, for each program of those rows."""
    if v["down.largest_ptr"] is not None:
        M, each = v["M"], v["tile_rows"]
        tiles = sum(cdiv(min(m + rows, M), each) - m // each for m in range(0, M, rows))
        largest = 4 * v.count("down.largest_ptr")
        count.reads("down.largest_ptr", largest, 4 * columns * tiles * v["down.R"])


def _through_down(count: Pass, v: Values, column_tiles: int, row_tiles: int) -> None:
    """dh and what is added to it; dgate and dup."""
    M, L, R = v["M"], v["L"], v["down.R"]
    dh = M * L * v.itemsize("dh_ptr")
    count.reads("dh_ptr", dh, dh)
    if v["down.dS_ptr"] is not None:
        count.flops += 2 * M * L * R
        _narrow(count, v, "down.dS_ptr", R, column_tiles)
        _factor(count, v, "down.A_ptr", R, row_tiles)
    for name in ("dgate_ptr", "dup_ptr"):
        count.writes(name, M * L * v.itemsize(name))


_GRADIENTS_ARGUMENTS = names(
    f"{_BRANCHES} {_CONSTANTS} dh_ptr dgate_ptr dup_ptr columns tile_rows stride_dh stride_dgate "
    "stride_dup STORES_h " + " ".join(f"down.{field}" for field in _DOWN.split())
)


def _gated_gradients(v: Values, grid: tuple[int, int, int]) -> list[Pass]:
    M, columns, BLOCK_M = v["M"], v["columns"], v["BLOCK_M"]
    row_tiles = cdiv(M, BLOCK_M)
    gradients = Pass("activation")
    _branches(gradients, v, columns, row_tiles)
    _through_down(gradients, v, columns, row_tiles)
    _largest(gradients, v, BLOCK_M, columns)
    if v["STORES_h"]:
        gradients.writes("dh_ptr", M * v["L"] * v.itemsize("dh_ptr"))
    return [gradients]


KERNELS: dict[str, tuple[frozenset[str], Any]] = {
    "gated_forward": (_FORWARD_ARGUMENTS, _gated_forward),
    "gated_backward": (_BACKWARD_ARGUMENTS, _gated_backward),
    "gated_gradients": (_GRADIENTS_ARGUMENTS, _gated_gradients),
}
