"""Launch configurations: frozen, and chosen by pure functions of shape, dtype and architecture.

`arch` is the compute capability of an NVIDIA GPU as Triton names it (80, 89, 90, 100, 120), or None
where there is none (the interpreter, other vendors).
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.runtime import driver

from . import triton_version  # noqa: F401

MAX_BLOCK_R = 64


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes of ticketed_gemm.

    A producer tile is BLOCK_S rows, which divide BLOCK_M, by at most MAX_R columns of the rank. A
    step of S · outᵀ takes at most MAX_E of them. With `descriptors` the K-loop over dense weights
    reads through tensor descriptors (TMA) wherever the operands have such (descriptors.py).
    Where dropout masks the low-rank part of dX, MASK_PARTS of its columns are made one by one.
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
class DecodeConfig:
    """Packed bytes per CTA of nf4_decode."""

    BLOCK: int
    num_warps: int


@dataclass(frozen=True)
class UpdateConfig:
    """Tile sizes of weight_update; BLOCK_R columns of the rank in one product."""

    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


# 64 columns of K make full 128-byte lines of 16-bit operands. Three stages of (128 + 128) × 64 × 2
# bytes are 96 KiB: two CTAs on an H100 or A100, and the epilogue's S and factor tiles still fit.
_GEMM_16BIT = GemmConfig(128, 128, 64, 64, 8, num_warps=8, num_stages=3)
# Hopper: blocks that one thread fetches leave the others 87 instructions for a step of K instead of
# 121 (forward, by count), and W scaled by g the registers for two CTAs. So do 32 columns of S at a
# time; and of a low-rank part that dropout masks, 32 columns and 16 of S.
_GEMM_16BIT_SM90 = replace(_GEMM_16BIT, descriptors=True, MAX_E=32)
_GEMM_16BIT_SM90_MASKED = replace(_GEMM_16BIT_SM90, MAX_E=16, MASK_PARTS=4)
# A100: 8 warps would take 176 registers each and so the whole multiprocessor; of 4 warps, with 64 ×
# 64 products each, two CTAs fit and one multiplies while the other waits, adds S or stores. Nearly
# all registers are taken: 16 columns of S at a time.
_GEMM_16BIT_SM80 = GemmConfig(128, 128, 32, 64, 8, num_warps=4, num_stages=4, MAX_E=16)
# Consumer parts (sm_86, sm_89, sm_120) have 99 KiB of shared memory for a block.
_GEMM_16BIT_SMALL_SHARED = GemmConfig(128, 128, 32, 64, 8, num_warps=8, num_stages=3)
# A second accumulator, the low-rank part of dX that dropout masks, leaves registers for 16 columns
# of S and of a float32 A at a time.
_GEMM_16BIT_NARROW = replace(_GEMM_16BIT, MAX_E=16)
_GEMM_16BIT_SMALL_SHARED_NARROW = replace(_GEMM_16BIT_SMALL_SHARED, MAX_E=16)
# tcgen05 keeps the accumulator in tensor memory; 4 warps read it back without splitting lanes. By
# pointers these would take 207 instructions to fetch what the tensor cores multiply in 256 cycles;
# by descriptors it is 95.
_GEMM_16BIT_SM100 = GemmConfig(128, 128, 64, 64, 8, num_warps=4, num_stages=3, descriptors=True)
# Two accumulators of 128 columns do not fit the registers of 4 warps, nor one and a W that is
# scaled, nor one and two results. MASK_PARTS would, but the kernel compiled with them
# computes wrong numbers here, for a reason that is not known.
_GEMM_16BIT_SM100_NARROW = replace(_GEMM_16BIT_SM100, BLOCK_N=64)
# Few rows read W at the speed of memory if enough of it is on its way: about 2 MB on an H100 (2.8
# TB/s × 0.7 µs). Narrow tiles make 128 CTAs of 4096 columns, long stages give each of them 24 KB of
# dense W, or 6 to 12 KB of packed bytes. The shrink's float32 A must fit beside: 16 columns.
_GEMM_16BIT_FEW_ROWS = GemmConfig(64, 32, 128, 64, 8, num_warps=4, num_stages=4, MAX_R=16)
_GEMM_16BIT_16_ROWS = GemmConfig(16, 32, 256, 16, 8, num_warps=4, num_stages=4, MAX_R=16, MAX_E=16)
# What a tuner may try for many rows, by generation. 256 columns take three quarters of the
# shared-memory traffic for each product, and a CTA then has a multiprocessor to itself. 64 rows are
# for shapes whose tiles would fill the device once and a bit. The tile that is picked also without
# descriptors: instructions are counted here, not timed.
_OTHERS = {
    8: (
        GemmConfig(128, 256, 32, 64, 8, num_warps=8, num_stages=3),
        GemmConfig(64, 128, 64, 64, 8, num_warps=4, num_stages=3),
    ),
    9: (
        _GEMM_16BIT,
        GemmConfig(128, 256, 64, 64, 8, num_warps=8, num_stages=3, descriptors=True),
        GemmConfig(64, 128, 64, 64, 8, num_warps=4, num_stages=3, descriptors=True),
    ),
    10: (
        replace(_GEMM_16BIT_SM100, descriptors=False),
        GemmConfig(128, 256, 64, 64, 8, num_warps=8, num_stages=3, descriptors=True),
    ),
}
_OTHERS_SMALL_SHARED = (GemmConfig(64, 128, 32, 64, 8, num_warps=4, num_stages=3),)
# IEEE float32 products run on the FMA pipes: small tiles, registers are the limit. Fewer than 64
# rows, because Triton 3.7.1 can give an "ieee" product of 64 rows or more to tcgen05 on sm_100, as
# TF32.
_GEMM_FLOAT32 = GemmConfig(32, 64, 16, 32, 8, num_warps=4, num_stages=2)

_STRIP_16BIT = StripConfig(64, 256, num_warps=8, num_stages=2)
_STRIP_16BIT_SM100 = StripConfig(64, 128, num_warps=4, num_stages=2)
# T is BLOCK_L × BLOCK_R in registers: half the columns for a wide rank.
_STRIP_16BIT_WIDE_RANK = StripConfig(64, 128, num_warps=8, num_stages=2)
_STRIP_16BIT_WIDE_RANK_SM100 = StripConfig(64, 64, num_warps=4, num_stages=2)
_STRIP_FLOAT32 = StripConfig(32, 32, num_warps=4, num_stages=2)

# IEEE products again, so fewer than 64 rows; 128 columns make full lines of a W that is read once.
_UPDATE = UpdateConfig(32, 128, 16, num_warps=4, num_stages=2)

SMALL_SHARED = (86, 87, 89, 120, 121)
# CTAs that one launch of strips aims for. A constant, not the number of multiprocessors: the order
# of the sums, and with it every bit of the result, depends on the shape and on the tiles of an
# architecture's configuration alone.
_STRIP_CTAS = 128


def current_arch() -> int | None:
    """Compute capability of Triton's device; None in the interpreter and on other vendors."""
    if triton.knobs.runtime.interpret:
        return None
    active = driver.active
    return _arch_of(active, active.get_current_device())


@functools.lru_cache(maxsize=8)
def _arch_of(active: Any, device: int) -> int | None:
    """Asked before every launch, and a driver takes its time to answer."""
    target = active.get_current_target()
    return int(target.arch) if target.backend == "cuda" else None


def pick_gemm(
    M: int,
    dtype: torch.dtype,
    arch: int | None,
    *,
    narrow: bool = False,
    masks: bool = False,
    R: int = 0,
) -> GemmConfig:
    """The configuration of ticketed_gemm for M rows and rank R.

    A tile needs more registers with a gain g (`narrow`) and where dropout masks the low-rank part
    of dX (`masks`).
    """
    if dtype == torch.float32:
        return _GEMM_FLOAT32
    if M <= 64:
        return _GEMM_16BIT_16_ROWS if M <= 16 else _GEMM_16BIT_FEW_ROWS
    if arch in SMALL_SHARED:
        return _GEMM_16BIT_SMALL_SHARED_NARROW if narrow or masks else _GEMM_16BIT_SMALL_SHARED
    if _has_tensor_memory(arch):
        return _GEMM_16BIT_SM100_NARROW if narrow or masks else _GEMM_16BIT_SM100
    if arch == 90:
        return _GEMM_16BIT_SM90_MASKED if masks else _GEMM_16BIT_SM90
    if arch == 80 and (narrow or masks):
        return _GEMM_16BIT_NARROW
    # Rows of S off 16 bytes load element by element, each by an address of its own.
    return _GEMM_16BIT_SM80 if arch == 80 and R % 16 == 0 else _GEMM_16BIT


def shares_shrink(M: int) -> bool:
    """Whether layers that read the same x [M, K] make all their S in the launch of the first.

    That takes a copy of their A side by side, a launch of its own. For few rows reading x again,
    from the L2 cache, costs less than the copy.
    """
    return M > 64


def other_gemms(
    M: int, dtype: torch.dtype, arch: int | None, *, narrow: bool = False
) -> tuple[GemmConfig, ...]:
    """What a tuner may try beside pick_gemm, where time depends on more than is modelled here."""
    if dtype == torch.float32 or M <= 64 or narrow:
        return ()
    if arch in SMALL_SHARED:
        return _OTHERS_SMALL_SHARED
    # The interpreter has Hopper's candidates, of which it picks one.
    others, picked = _OTHERS.get((arch or 90) // 10, ()), pick_gemm(M, dtype, arch)
    return tuple(config for config in others if config != picked)


def pick_strips(dtype: torch.dtype, R: int, arch: int | None) -> StripConfig:
    """The configuration of strips for rank R."""
    if dtype == torch.float32:
        return _STRIP_FLOAT32
    if R > 32:
        return _STRIP_16BIT_WIDE_RANK_SM100 if _has_tensor_memory(arch) else _STRIP_16BIT_WIDE_RANK
    return _STRIP_16BIT_SM100 if _has_tensor_memory(arch) else _STRIP_16BIT


def smaller(config: GemmConfig | StripConfig) -> GemmConfig | StripConfig | None:
    """The configuration to try where this one does not fit; None after the smallest.

    First fewer stages, which cost nothing but overlap, then tiles of half the size, which cost
    traffic: of K before N, since more products share the rest of a tile then.
    """
    if config.num_stages > 2:
        return replace(config, num_stages=config.num_stages - 1)
    if isinstance(config, StripConfig):
        halves = {"BLOCK_L": config.BLOCK_L // 2}
    elif config.BLOCK_K > 32:
        halves = {"BLOCK_K": config.BLOCK_K // 2}
    else:
        # What dropout masks of half the columns needs no parts.
        config = replace(config, MASK_PARTS=1)
        halves = {"BLOCK_N": config.BLOCK_N // 2}
    return replace(config, **halves) if min(halves.values()) >= 16 else None


def uses_mma_sync(config: GemmConfig, dtype: torch.dtype, arch: int | None) -> bool:
    """Whether 16-bit products become mma.sync: before Hopper, on consumer parts, on small tiles."""
    if arch is None or dtype == torch.float32:
        return False
    return config.BLOCK_M < 64 or not (arch == 90 or _has_tensor_memory(arch))


def settles_products(dtype: torch.dtype, arch: int | None) -> bool:
    """Whether a product whose operand is made in registers has to end with its iteration: wgmma."""
    return arch == 90 and dtype.itemsize == 2


# Thread instructions that a GPU issues in the time of one byte of memory traffic: 19.5 T/s over 2
# TB/s (A100), 28 over 2.8 (H100), 35 over 8 (B200). On consumer parts (41 over 1.0, 52 over 1.8)
# half of that, since their L2 holds a good part of a dense weight.
_INSTRUCTIONS_PER_BYTE = {80: 10.0, 90: 10.0, 100: 4.4, 103: 4.4, 86: 12.0, 89: 20.0, 120: 14.0}
# What decoding adds to the K-loop for each weight and block of rows is 2.9 (sm_100) to 5.5 (sm_89)
# instructions by count; about 8 slots, since a loop that waits for its products does not fill them.
_NF4_SLOTS_PER_WEIGHT = 8.0


def why_nf4_workspace(M: int, K: int, dtype: torch.dtype, arch: int | None) -> str | None:
    """Why an NF4 weight [N, K] is decoded by a launch of its own; None: ticketed_gemm decodes it.

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


def _has_tensor_memory(arch: int | None) -> bool:
    return arch is not None and arch // 10 in (10, 11)


def pick_decode() -> DecodeConfig:
    """The configuration of nf4_decode."""
    return DecodeConfig(4096, num_warps=4)


def pick_update() -> UpdateConfig:
    """The configuration of weight_update, for every dtype and rank."""
    return _UPDATE


def pick_row_norms(R: int, dtype: torch.dtype) -> UpdateConfig:
    """The configuration of row_norms: the tiles of weight_update; of 16-bit numbers a wider part of
    the rank in one product, and full lines of W are half as many columns."""
    if dtype == torch.float32:
        return _UPDATE
    return replace(_UPDATE, BLOCK_K=64, BLOCK_R=min(32, rank_block(R)))


def rank_block(R: int) -> int:
    """Columns of the rank in one tile: R padded to 16, in chunks of at most 64."""
    return min(MAX_BLOCK_R, max(16, 1 << (R - 1).bit_length()))


def expand_block(R: int, dtype: torch.dtype) -> int:
    """Columns of the rank in one step of S · outᵀ, for S in `dtype`.

    Few where elements do not load in vectors or multiply on the FMA pipes: either way each takes
    registers of its own.
    """
    return 16 if dtype == torch.float32 or R % 16 else rank_block(R)


def row_ranges(M: int, programs: int, block_m: int) -> tuple[int, int]:
    """Number of ranges that strips cuts M rows into, and rows in a range (a multiple of block_m).

    `programs` is the number of CTAs for one range.
    """
    blocks = -(-M // block_m)
    wanted = min(-(-_STRIP_CTAS // max(1, programs)), blocks)
    rows = -(-blocks // wanted) * block_m
    return -(-M // rows), rows


def precision_of(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: IEEE products for float32 unless torch's user allowed TF32."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"
