"""The tiles of a launch: one table of architectures, and pure functions of shape and dtype.

`arch` is the compute capability of an NVIDIA GPU as Triton names it (80, 89, 90, 100, 120), or None
where there is none (the interpreter, other vendors). environment.py reads it.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

MAX_BLOCK_R = 64


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes of ticketed_gemm.

    A producer tile is BLOCK_S rows, which divide BLOCK_M, by at most MAX_R columns of the rank. A
    step of S · outᵀ takes at most MAX_E of them. With `descriptors` the K-loop over dense weights
    reads through tensor descriptors (TMA) wherever the operands have such (descriptors.py).
    Where dropout masks the low-rank part of dX, its columns are computed in MASK_PARTS parts.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_S: int
    GROUP_M: int
    num_warps: int
    num_stages: int
    MAX_R: int = MAX_BLOCK_R
    MAX_E: int = MAX_BLOCK_R
    descriptors: bool = False
    MASK_PARTS: int = 1


@dataclass(frozen=True)
class StripConfig:
    """Tile sizes of strips: a CTA keeps BLOCK_L columns and walks down its rows by BLOCK_M."""

    BLOCK_M: int
    BLOCK_L: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowsConfig:
    """Tile sizes of expand and shrink: rows, and columns of the long dimension (N or K). A tile of
    expand takes at most MAX_R columns of the rank in a step."""

    BLOCK_M: int
    BLOCK_L: int
    num_warps: int
    num_stages: int
    MAX_R: int = MAX_BLOCK_R


@dataclass(frozen=True)
class DecodeConfig:
    """Packed bytes per CTA of nf4_decode."""

    BLOCK: int
    num_warps: int


@dataclass(frozen=True)
class WeightPassConfig:
    """Tile sizes of a pass over a dense weight, weight_update or row_norms; BLOCK_R columns of the
    rank in one product."""

    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


class Choices(NamedTuple):
    """The configurations of an architecture for 16-bit numbers; None: as `plain`.

    The tile of ticketed_gemm for many rows is `plain`, or one of a `ragged_rank`, which is no
    multiple of 8; with a `gain` g, which scales W or stores V beside y; or one where dropout masks
    the low-rank part of dX. A tuner may try `others` beside plain, and where their tiles fill
    `multiprocessors` twice `wide` ones, or with a gain `wide_gain` and for dX `wide_masks_dX`.
    `strips` is for ranks up to 32; one launch of strips aims for `strip_ctas`.
    """

    plain: GemmConfig
    ragged_rank: GemmConfig | None = None
    gain: GemmConfig | None = None
    masks_dX: GemmConfig | None = None
    others: tuple[GemmConfig, ...] = ()
    wide: tuple[GemmConfig, ...] = ()
    wide_gain: tuple[GemmConfig, ...] = ()
    wide_masks_dX: tuple[GemmConfig, ...] = ()
    multiprocessors: int = 132
    strips: StripConfig = StripConfig(64, 256, num_warps=8, num_stages=2)
    # T is BLOCK_L × BLOCK_R in registers: half the columns.
    strips_wide_rank: StripConfig = StripConfig(64, 128, num_warps=8, num_stages=2)
    # Constants, not the number of multiprocessors of a device: the order of the sums, and with it
    # every bit of the result, depends on the shape and on this row alone. Enough of dY must be on
    # its way to keep the memory busy: bandwidth times about a microsecond.
    strip_ctas: int = 128

    @property
    def picked(self) -> list[GemmConfig | StripConfig]:
        """All of them but the others."""
        gemms = (self.plain, self.ragged_rank, self.gain, self.masks_dX)
        return [*filter(None, gemms), self.strips, self.strips_wide_rank]


# Compute capabilities of the same kind.
SMALL_SHARED = (86, 87, 89, 120, 121)
TENSOR_MEMORY = (100, 101, 103, 110)

# 64 columns of K make full 128-byte lines of 16-bit operands. Three stages of (128 + 128) × 64 × 2
# bytes are 96 KiB: two CTAs on an H100 or A100, and the epilogue's S and factor tiles still fit.
_GENERAL = GemmConfig(128, 128, 64, 64, 8, num_warps=8, num_stages=3)
# A100: 8 warps would take 176 registers each and so the whole multiprocessor; of 4 warps, with 64 ×
# 64 products each, two CTAs fit and one multiplies while the other waits, adds S or stores. Nearly
# all registers are taken: 16 columns of S at a time.
_A100 = GemmConfig(128, 128, 32, 64, 8, num_warps=4, num_stages=4, MAX_E=16)
# A second accumulator, the low-rank part of dX that dropout masks, leaves registers for 16 columns
# of S and of a float32 A at a time.
_A100_FULL = replace(_GENERAL, MAX_E=16)
# sm_86, sm_89 and sm_120 have 99 KiB of shared memory for a block.
_CONSUMER = GemmConfig(128, 128, 32, 64, 8, num_warps=8, num_stages=3)
_CONSUMER_FULL = replace(_CONSUMER, MAX_E=16)
# Hopper: with TMA, a K step costs 87 instructions instead of 120 (forward, counted), and with W
# scaled by g two CTAs fit. They also fit with 32 columns of S at a time; with a low-rank part that
# dropout masks, with 32 of its columns and 16 of S.
_H100 = replace(_GENERAL, descriptors=True, MAX_E=32)
_H100_MASKS = replace(_H100, MAX_E=16, MASK_PARTS=4)
# tcgen05 keeps the accumulator in tensor memory; 4 warps read it back without splitting lanes. By
# pointers these would take 213 instructions to fetch what the tensor cores multiply in 256 cycles;
# by descriptors it is 93.
_B200 = GemmConfig(128, 128, 64, 64, 8, num_warps=4, num_stages=3, descriptors=True)
# Two accumulators of 128 columns do not fit the registers of 4 warps, nor one and a W that is
# scaled, nor one and two results. MASK_PARTS would, but the kernel compiled with them
# computes wrong numbers here, for reasons unknown.
_B200_FULL = replace(_B200, BLOCK_N=64)
# Of what a tuner may try: 256 columns take four fifths of the traffic of 128 through shared memory
# for each product and three quarters of it through L2, and a CTA then has a multiprocessor to
# itself. Groups of 16 row blocks read W half as often from L2, and x from memory for longer. 64
# rows are for shapes whose tiles would fill the device once and a bit. The tile that is picked also
# without descriptors: instructions are counted here, not timed.
_WIDE = GemmConfig(128, 256, 64, 64, 8, num_warps=8, num_stages=3, MAX_E=32, descriptors=True)
_WIDE_4 = replace(_WIDE, num_stages=4)
_LOW = GemmConfig(64, 128, 64, 64, 8, num_warps=4, num_stages=3)

# By compute capability; what is not written in a row is as in its first column.
TABLE: dict[tuple[int | None, ...], Choices] = {
    (80,): Choices(
        plain=_A100,
        # Rows of S off 16 bytes load element by element, each by an address of its own.
        ragged_rank=_GENERAL,
        gain=_A100_FULL,
        masks_dX=_A100_FULL,
        others=(GemmConfig(128, 256, 32, 64, 8, num_warps=8, num_stages=3), _LOW),
    ),
    SMALL_SHARED: Choices(
        plain=_CONSUMER,
        gain=_CONSUMER_FULL,
        masks_dX=_CONSUMER_FULL,
        others=(GemmConfig(64, 128, 32, 64, 8, num_warps=4, num_stages=3),),
    ),
    (90,): Choices(
        plain=_H100,
        masks_dX=_H100_MASKS,
        others=(_GENERAL, replace(_LOW, descriptors=True)),
        wide=(_WIDE_4, _WIDE, replace(_WIDE_4, GROUP_M=16)),
        wide_gain=(_WIDE_4, _WIDE, replace(_WIDE_4, GROUP_M=16)),
        wide_masks_dX=(replace(_WIDE_4, MAX_E=16, MASK_PARTS=4),),
        strip_ctas=264,
    ),
    TENSOR_MEMORY: Choices(
        plain=_B200,
        gain=_B200_FULL,
        masks_dX=_B200_FULL,
        others=(replace(_B200, descriptors=False),),
        wide=(_WIDE_4, _WIDE, replace(_WIDE_4, GROUP_M=16)),
        multiprocessors=148,
        strips=StripConfig(64, 128, num_warps=4, num_stages=2),
        strips_wide_rank=StripConfig(64, 64, num_warps=4, num_stages=2),
        strip_ctas=528,
    ),
    # The interpreter, which has Hopper's others, and devices of other vendors.
    (None,): Choices(plain=_GENERAL, others=(replace(_LOW, descriptors=True),), wide=(_WIDE_4,)),
}
_BY_ARCH = {arch: row for archs, row in TABLE.items() for arch in archs}
# A device that is not in the table.
_UNKNOWN = Choices(plain=_GENERAL)

# Few rows read W at the speed of memory if enough of it is on its way: about 2 MB on an H100 (2.8
# TB/s × 0.7 µs). Narrow tiles make 128 CTAs of 4096 columns, long stages give each of them 24 KB of
# dense W, or 6 to 12 KB of packed bytes. The shrink's float32 A must fit beside: 16 columns.
_FEW_ROWS = GemmConfig(64, 32, 128, 64, 8, num_warps=4, num_stages=4, MAX_R=16)
_16_ROWS = GemmConfig(16, 32, 256, 16, 8, num_warps=4, num_stages=4, MAX_R=16, MAX_E=16)
# IEEE float32 products run on the FMA pipes: small tiles, registers are the limit. Fewer than 64
# rows, because Triton 3.7.1 can give an "ieee" product of 64 rows or more to tcgen05 on sm_100, as
# TF32.
_GEMM_FLOAT32 = GemmConfig(32, 64, 16, 32, 8, num_warps=4, num_stages=2)

_STRIPS_FLOAT32 = StripConfig(32, 32, num_warps=4, num_stages=2)

# expand stores 16 KB a tile. shrink reads x at the speed of memory if enough of it is on its way:
# 2048 rows are 128 CTAs, each with five blocks of 2 KB, and 8192 are 256, with three of 4 KB.
# Products of fewer than 64 rows are mma.sync everywhere. Blocks of 64 columns of K leave registers
# for two CTAs on a multiprocessor beside 64 columns of a float32 A and dropout's random words.
_EXPAND = RowsConfig(64, 128, num_warps=4, num_stages=1)
_EXPAND_FLOAT32 = RowsConfig(32, 64, num_warps=4, num_stages=1, MAX_R=16)
_SHRINK_16 = RowsConfig(16, 64, num_warps=4, num_stages=6)
_SHRINK_32 = RowsConfig(32, 64, num_warps=4, num_stages=4)
_SHRINK_FLOAT32 = RowsConfig(16, 32, num_warps=4, num_stages=2)
# The same on every architecture.
OF_ALL = (_FEW_ROWS, _16_ROWS, _GEMM_FLOAT32, _STRIPS_FLOAT32)
# The same, of the routes that leave the product with W to cuBLAS.
OF_ROUTES = (_EXPAND, _EXPAND_FLOAT32, _SHRINK_16, _SHRINK_32, _SHRINK_FLOAT32)

DECODE = DecodeConfig(4096, num_warps=4)
# IEEE products again, so fewer than 64 rows; 128 columns make full lines of a W that is read once.
UPDATE = WeightPassConfig(32, 128, 16, num_warps=4, num_stages=2)


def pick_gemm(
    M: int,
    dtype: torch.dtype,
    arch: int | None,
    *,
    has_gain: bool = False,
    masks_dX: bool = False,
    R: int = 0,
) -> GemmConfig:
    """The tiles of ticketed_gemm for M rows and rank R, with a gain g or a masked low-rank dX."""
    if dtype == torch.float32:
        return _GEMM_FLOAT32
    if M <= 64:
        return _16_ROWS if M <= 16 else _FEW_ROWS
    row = _BY_ARCH.get(arch, _UNKNOWN)
    if masks_dX:
        return row.masks_dX or row.plain
    if has_gain:
        return row.gain or row.plain
    return row.ragged_rank or row.plain if R % 8 else row.plain


def other_gemms(
    M: int,
    N: int,
    dtype: torch.dtype,
    arch: int | None,
    *,
    has_gain: bool = False,
    masks_dX: bool = False,
) -> tuple[GemmConfig, ...]:
    """Candidates of the tuner beside pick_gemm, where time depends on more than is modelled here:
    for many rows of 16-bit numbers, the most promising first. N: columns of the output."""
    if dtype == torch.float32 or M <= 64:
        return ()
    row = _BY_ARCH.get(arch, _UNKNOWN)
    wide = row.wide_masks_dX if masks_dX else row.wide_gain if has_gain else row.wide
    found = [c for c in wide if _tiles(c, M, N) >= 2 * row.multiprocessors]
    return tuple(found) if has_gain or masks_dX else (*found, *row.others)


def _tiles(config: GemmConfig, M: int, N: int) -> int:
    return -(-M // config.BLOCK_M) * -(-N // config.BLOCK_N)


def strip_ctas(arch: int | None) -> int:
    """CTAs that one launch of strips aims for."""
    return _BY_ARCH.get(arch, _UNKNOWN).strip_ctas


def pick_strips(dtype: torch.dtype, R: int, arch: int | None) -> StripConfig:
    """The tiles of strips for rank R."""
    if dtype == torch.float32:
        return _STRIPS_FLOAT32
    row = _BY_ARCH.get(arch, _UNKNOWN)
    return row.strips_wide_rank if R > 32 else row.strips


def pick_expand(dtype: torch.dtype) -> RowsConfig:
    """The tiles of expand."""
    return _EXPAND_FLOAT32 if dtype == torch.float32 else _EXPAND


def pick_shrink(M: int, dtype: torch.dtype) -> RowsConfig:
    """The tiles of shrink for M rows."""
    if dtype == torch.float32:
        return _SHRINK_FLOAT32
    return _SHRINK_16 if M <= 4096 else _SHRINK_32


def uses_mma_sync(config: GemmConfig, dtype: torch.dtype, arch: int | None) -> bool:
    """Whether 16-bit products become mma.sync: before Hopper, on consumer parts, on small tiles."""
    if arch is None or dtype == torch.float32:
        return False
    return config.BLOCK_M < 64 or arch not in (90, *TENSOR_MEMORY)


def settles_products(dtype: torch.dtype, arch: int | None) -> bool:
    """Whether a product whose operand is made in registers must complete in its iteration:
    wgmma."""
    return arch == 90 and dtype.itemsize == 2


# Thread instructions that a GPU issues in the time of one byte of memory traffic: 19.5 T/s over 2
# TB/s (A100), 28 over 2.8 (H100), 35 over 8 (B200). On consumer parts (41 over 1.0, 52 over 1.8)
# half of that, since their L2 holds a good part of a dense weight.
_INSTRUCTIONS_PER_BYTE = {
    80: 10.0,
    90: 10.0,
    100: 4.4,
    103: 4.4,
    86: 12.0,
    89: 20.0,
    120: 14.0,
}
# What decoding adds to the K-loop for each weight and block of rows is 2.9 (sm_100) to 5.5 (sm_89)
# instructions by count; about 8 slots, since a loop that waits for its products does not fill them.
_NF4_SLOTS_PER_WEIGHT = 8.0


def why_nf4_workspace(M: int, K: int, dtype: torch.dtype, arch: int | None) -> str | None:
    """Why an NF4 weight [N, K] is decoded by a separate launch; None: ticketed_gemm decodes it.

    The launch writes W once, one byte of memory traffic for each; ticketed_gemm stores nothing but
    decodes W again for every block of rows.
    """
    if K % 2:
        return "rows of odd length start within a byte"
    blocks = -(-M // pick_gemm(M, dtype, arch).BLOCK_M)
    workspace = (0.5 + dtype.itemsize) * _INSTRUCTIONS_PER_BYTE.get(arch or 90, 10.0)
    if blocks * _NF4_SLOTS_PER_WEIGHT > workspace:
        return f"decoding W for each of {blocks} blocks of rows costs more than storing it once"
    return None


def pick_row_norms(R: int, dtype: torch.dtype) -> WeightPassConfig:
    """The tiles of weight_update; of 16-bit numbers a wider part of the rank in one product, and
    full lines of W are half as many columns."""
    if dtype == torch.float32:
        return UPDATE
    return replace(UPDATE, BLOCK_K=64, BLOCK_R=min(32, rank_block(R)))


def rank_block(R: int) -> int:
    """Columns of the rank in one tile: R padded to 16, in chunks of at most 64."""
    return min(MAX_BLOCK_R, max(16, 1 << (R - 1).bit_length()))


def expand_block(R: int, dtype: torch.dtype) -> int:
    """Columns of the rank in one step of S · outᵀ, for S in `dtype`.

    Few where the rank pads a wider step, where elements load one by one, or where they multiply on
    the FMA pipes: each then takes registers of its own.
    """
    return 16 if dtype == torch.float32 or R % 16 else rank_block(R)


def row_ranges(M: int, programs: int, block_m: int, arch: int | None) -> tuple[int, int]:
    """The number of ranges into which strips splits M rows, and the rows per range, a multiple of
    block_m.

    `programs` is the number of CTAs for one range.
    """
    blocks = -(-M // block_m)
    wanted = min(-(-strip_ctas(arch) // max(1, programs)), blocks)
    rows = -(-blocks // wanted) * block_m
    return -(-M // rows), rows
