"""What is asserted of a launch that was compiled for an absent GPU."""

from __future__ import annotations

import re

import torch
from lora_fast.kernels.triton_version import VERSION
from pins import is_pinned

from bench import async_products
from bench.instruments import resources, stub_driver


def assert_fits(launch: stub_driver.Launch, arch: int) -> None:
    found, limits = launch.kernel.resources, resources.limits_of(arch)
    # Below the limit ptxas trades a few registers for another CTA; at the limit it had no choice.
    # Kernels beside cuBLAS wait for memory: they gain by it, if it is not within a loop.
    in_loops = any(loop.by_class["local"] for loop in found.hot_loops)
    costs = in_loops if launch.name in ("shrink", "expand") else found.mma
    trades = found.registers <= 250 and not costs
    allowed = 32 if trades or not is_pinned("triton") else 0
    assert found.local_bytes <= allowed, f"{launch.name} spills: {found}"
    assert found.shared_bytes <= limits.shared_per_block, f"{launch.name}: {found}"
    assert found.ctas_per_sm >= 1, f"{launch.name} does not fit: {found}"


# Constants at an address in a register are read slowly.
_INDIRECT = re.compile(r"ld\.param[^;]*\[%[^;]*;")


def assert_products_run_on(launch: stub_driver.Launch, arch: int) -> None:
    """Nothing generic between a fence and a product, and no wgmma that waits for another one; every
    parameter from an address that is known when it is compiled.

    Before 3.7 Triton fenced no product from what cp.async wrote (docs/kernels.md).
    """
    ptx = launch.kernel.text("ptx")
    assert not _INDIRECT.findall(ptx), launch.name
    if VERSION >= (3, 7):
        assert async_products.unfenced(ptx) == [], launch.name
    if arch == 90:
        assert async_products.serialised(ptx) == (), launch.name


def assert_walk_fits(
    launch: stub_driver.Launch, arch: int, *, away_from_loops: int, multiplies: bool
) -> None:
    """Of kernels that walk over rows: as many bytes of local memory as lie outside of loops, eight
    warps on a multiprocessor, and products where it multiplies, all right in themselves."""
    found, limits = launch.kernel.resources, resources.limits_of(arch)
    # A few registers that live through a loop may lie in memory meanwhile.
    assert found.local_bytes <= away_from_loops, f"{launch.name} spills: {found}"
    assert all(loop.by_class["local"] == 0 for loop in found.hot_loops), launch.name
    assert found.shared_bytes <= limits.shared_per_block, f"{launch.name}: {found}"
    assert found.ctas_per_sm * launch.kernel.num_warps >= 8, f"{launch.name}: {found}"
    expected = {limits.mma} if multiplies else set()
    # Products of fewer than 64 rows are mma.sync everywhere.
    assert set(found.mma) - {"HMMA"} <= expected, f"{launch.name}: {found}"
    assert bool(found.mma) == bool(expected), f"{launch.name}: {found}"
    assert_products_run_on(launch, arch)


def expected_mma(launch: stub_driver.Launch, arch: int) -> set[str]:
    """The products of the generation; mma.sync for tiles that its larger ones do not fit."""
    arguments = launch.arguments
    first = (arguments.get("members") or (None,))[0]
    x = arguments["x_ptr"] if first is None else getattr(first, "x_ptr", first[1])
    if x.dtype == torch.float32:
        return set()
    return {"HMMA" if launch.constexprs["BLOCK_M"] < 64 else resources.limits_of(arch).mma}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
