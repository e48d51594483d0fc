"""The tiles of the kernels of experts: pure functions of dtype and what a launch computes."""

from dataclasses import replace

import torch

from .launch_policy import RowsConfig, StripConfig, pick_strips

# Most experts have some hundred rows of a call: tiles of 64, of which little is padding. What is
# read of a factor is read again for every tile of rows, from the L2 cache.
_GATHER = RowsConfig(32, 64, num_warps=4, num_stages=4)
# Of 64 columns of a float32 A fewer are on their way: two CTAs fit where shared memory is small.
_GATHER_WIDE_RANK = replace(_GATHER, num_stages=3)
_GATHER_FLOAT32 = RowsConfig(16, 32, num_warps=4, num_stages=2)
# A product with W, with the low rank in the same sum, where torch has no grouped product.
_PRODUCT = RowsConfig(64, 128, num_warps=4, num_stages=3)
_ADD = RowsConfig(64, 128, num_warps=4, num_stages=1)
# IEEE products run on the FMA pipes, and need fewer than 64 rows: see launch_policy.
_PRODUCT_FLOAT32 = RowsConfig(32, 64, num_warps=4, num_stages=2, MAX_R=16)
# Tokens, and columns of 16-bit rows that load in vectors of 16 bytes.
_SCATTER = RowsConfig(16, 128, num_warps=4, num_stages=1)

# Columns of K in a step of a product with W.
PRODUCT_K = 64
PRODUCT_K_FLOAT32 = 16


def pick_gather(dtype: torch.dtype, R: int) -> RowsConfig:
    """The tiles of expert_shrink for rank R."""
    if dtype == torch.float32:
        return _GATHER_FLOAT32
    return _GATHER_WIDE_RANK if R > 32 else _GATHER


def pick_product(dtype: torch.dtype, *, has_base: bool) -> RowsConfig:
    """The tiles of expert_product, with W or of the low rank alone."""
    if dtype == torch.float32:
        return _PRODUCT_FLOAT32
    return _PRODUCT if has_base else _ADD


def pick_scatter() -> RowsConfig:
    """The tiles of expert_scatter."""
    return _SCATTER


def pick_expert_strips(dtype: torch.dtype, R: int, arch: int | None) -> StripConfig:
    """The tiles of expert_gradients: those of strips."""
    return pick_strips(dtype, R, arch)
