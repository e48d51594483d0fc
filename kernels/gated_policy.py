"""The tiles of the kernels of a gated MLP and of the gate of experts: pure functions of shape,
dtype and architecture."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .launch_policy import SMALL_SHARED, TENSOR_MEMORY, RowsConfig, rank_block
from .triton_version import VERSION


@dataclass(frozen=True)
class GatedConfig:
    """Tile sizes of gated_backward: rows, and PARTS times BLOCK_L columns of a program."""

    BLOCK_M: int
    BLOCK_L: int
    PARTS: int
    num_warps: int
    num_stages: int = 1


# Nothing is pipelined: a tile is read at once, and the other CTAs of a multiprocessor compute
# meanwhile. IEEE products of float32: fewer than 64 rows, see launch_policy.
_FORWARD = RowsConfig(64, 64, num_warps=4, num_stages=1)
_FORWARD_WIDE_RANK = RowsConfig(64, 32, num_warps=4, num_stages=1)
_GRADIENTS = RowsConfig(64, 64, num_warps=4, num_stages=1)
_FLOAT32 = RowsConfig(32, 32, num_warps=4, num_stages=1)
_FLOAT32_LOW = RowsConfig(16, 32, num_warps=4, num_stages=1)
# Three sums of 32 × 16 for each part are what the registers hold beside the tiles: all four warps
# share the 64 rows, so wider tiles would take more.
_FOUR_PARTS = GatedConfig(64, 32, PARTS=4, num_warps=4)
_THREE_PARTS = GatedConfig(64, 32, PARTS=3, num_warps=4)
_TWO_PARTS = GatedConfig(64, 32, PARTS=2, num_warps=4)
_WIDE_RANK = GatedConfig(64, 32, PARTS=1, num_warps=4)
# For what would use local memory in its loop otherwise: one CTA on a multiprocessor instead of two.
_WIDE_RANK_8_WARPS = GatedConfig(64, 32, PARTS=1, num_warps=8)
# Where the sums lie in tensor memory, 8 warps share them, and the tile.
_B200 = GatedConfig(64, 64, PARTS=4, num_warps=8)
_B200_MASKS = GatedConfig(64, 64, PARTS=3, num_warps=8)
# The products take as long wherever they are made, so that fewer passes cost no time.
_FLOAT32_PARTS = GatedConfig(32, 32, PARTS=4, num_warps=4)
_FLOAT32_WIDE_RANK = GatedConfig(32, 32, PARTS=1, num_warps=4)
OF_GATED = (
    _FORWARD,
    _FORWARD_WIDE_RANK,
    _FLOAT32,
    _FOUR_PARTS,
    _THREE_PARTS,
    _TWO_PARTS,
    _WIDE_RANK,
    _WIDE_RANK_8_WARPS,
    _B200,
    _B200_MASKS,
    _FLOAT32_PARTS,
    _FLOAT32_WIDE_RANK,
)
# Of the gate of experts, beside some of these.
OF_EXPERTS = (_FLOAT32_LOW,)

# A launch of gated_forward aims for so many programs of at most so many tiles of columns; one of
# gated_backward for so many CTAs: some waves of any device, so that the last one does not show.
_PROGRAMS, _MOST_TILES = 1024, 8
_CTAS = 768


def pick_gated_forward(dtype: torch.dtype, R: int) -> RowsConfig:
    """The tiles of gated_forward, for ranks of at most R."""
    if dtype == torch.float32:
        return _FLOAT32
    return _FORWARD if R <= 16 else _FORWARD_WIDE_RANK


def pick_gated_gradients(dtype: torch.dtype) -> RowsConfig:
    """The tiles of gated_gradients."""
    return _FLOAT32 if dtype == torch.float32 else _GRADIENTS


def pick_gated_backward(
    BLOCK_R: int, arch: int | None, *, drops: bool, dtype: torch.dtype = torch.bfloat16
) -> GatedConfig:
    """The tiles of gated_backward, for ranks padded to BLOCK_R."""
    if dtype == torch.float32:
        return _FLOAT32_PARTS if BLOCK_R <= 16 else _FLOAT32_WIDE_RANK
    if BLOCK_R > 16:
        return _WIDE_RANK_8_WARPS if drops and arch in (120, 121) else _WIDE_RANK
    if arch in TENSOR_MEMORY:
        return _B200_MASKS if drops else _B200
    crowded = arch in SMALL_SHARED or (drops and arch in (80, 90))
    if dtype == torch.float16:
        # Scales, and operands of their own to go with them, take a part's registers.
        return _TWO_PARTS if crowded else _THREE_PARTS
    return _THREE_PARTS if crowded else _FOUR_PARTS


def fits_registers(dtype: torch.dtype, ranks: Sequence[int], *, drops: bool) -> bool:
    """Whether gated_backward holds layers of these ranks, 0 for those without an adapter.

    Registers of their own take random words of masks, scales of float16, and an address for each
    element of ranks whose rows are no vectors; float32 takes twice as many for everything. Beyond
    these limits a loop has up to 40 accesses of local memory, counted for sm_80 to sm_100. So it
    has (about 20 of 2300 instructions) in bfloat16 without dropout for ranks above 32 that are no
    multiples of 8: less than four more passes cost.

    Ranks above 64 would need 8 warps and all 255 registers, so that one CTA of 64 × 32 has a
    multiprocessor to itself. At R = 128 its tile then reads 94 KB from L2 (118 with factors in
    float32) for 20 KB of memory traffic, and nothing computes meanwhile. A second launch for the
    columns of the rank beyond 64 would read dgate, dup and h again, as strips do, and h would have
    to be stored: nine passes, too.
    """
    # Before 3.7 Triton knows no multiples of 8 here (gated_tiles.are_eights), nor Scales.
    ragged = VERSION < (3, 7) or any(R % 8 for R in ranks)
    if dtype == torch.float32:
        most = 32
    elif dtype == torch.float16:
        most = 0 if ragged else 32 if drops else 64
    else:
        most = 32 if ragged and drops else 64
    return max(ranks) <= most


def pick_expert_forward(dtype: torch.dtype, R: int, *, plain: bool) -> RowsConfig:
    """The tiles of expert_gate_forward, for ranks of at most R and a plain gate or not."""
    return pick_gated_forward(dtype, R if plain else max(R, 17))


def pick_expert_backward(BLOCK_R: int, arch: int | None, *, plain: bool) -> GatedConfig:
    """The tiles of expert_gate_backward, for ranks padded to BLOCK_R and a plain gate or not."""
    if BLOCK_R > 16 and arch in TENSOR_MEMORY:
        return _WIDE_RANK_8_WARPS
    config = pick_gated_backward(BLOCK_R, arch, drops=False)
    if plain:
        return config
    return {_FOUR_PARTS: _THREE_PARTS, _THREE_PARTS: _TWO_PARTS}.get(config, config)


def pick_expert_gradients(dtype: torch.dtype) -> RowsConfig:
    """The tiles of expert_gate_gradients."""
    return _FLOAT32_LOW if dtype == torch.float32 else _FORWARD_WIDE_RANK


def fits_experts(
    dtype: torch.dtype, ranks: Sequence[int], arch: int | None, *, plain: bool
) -> bool:
    """Whether expert_gate_backward holds projections of these ranks, 0 without an adapter."""
    most = 32 if arch in SMALL_SHARED else 64
    return dtype == torch.bfloat16 and max(ranks) <= (most if plain else most // 2)


def pick_sums(R: int) -> RowsConfig:
    """The rows of expert_sums, and its columns of the rank."""
    return RowsConfig(64, rank_block(max(R, 1)), num_warps=4, num_stages=1)


def columns_each(config: RowsConfig, M: int, L: int) -> int:
    """The tiles of columns of a program of gated_forward."""
    blocks, tiles = -(-M // config.BLOCK_M), -(-L // config.BLOCK_L)
    return min(_MOST_TILES, max(1, blocks * tiles // _PROGRAMS))


def tiles_each(config: RowsConfig, row_tiles: int, L: int) -> int:
    """The tiles of columns of a program of the experts' gate, at least 128 columns: its part of S,
    written and read in float32, is to cost less than h."""
    tiles = -(-L // config.BLOCK_L)
    least = -(-128 // config.BLOCK_L)
    return min(tiles, max(least, min(_MOST_TILES, row_tiles * tiles // _PROGRAMS)))


def rows_each(config: GatedConfig, M: int, blocks: int) -> int:
    """The rows of a program of gated_backward, of so many blocks of columns."""
    tiles = -(-M // config.BLOCK_M)
    ranges = max(1, min(tiles, -(-_CTAS // blocks)))
    return -(-tiles // ranges) * config.BLOCK_M
