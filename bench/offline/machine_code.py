"""What the compiler made of every kernel of a step: registers, spills, occupancy, instructions.

Of the main loop (the K-loop over W; in strips the walk over rows): the instructions of one
iteration by class, the cycles in which a multiprocessor issues them (4 schedulers, one warp
instruction a cycle each) and the cycles in which its tensor cores do the loop's products. Where the
first exceed the second, instructions and not products set the pace. Strips read memory all the
time: for them the bandwidth counts that the issue cycles would allow at the boost clock.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from bench import sass, stub_driver

from .rooflines import SPEEDS

SCHEDULERS = 4
_SHAPE = re.compile(r"HMMA\.(16)(8)(16)\.|HGMMA\.(\d+)x(\d+)x(\d+)\.")
# Warps that one instruction multiplies for.
_WARPS_OF_MMA = {"HMMA": 1, "HGMMA": 4}


def rows(logs: Iterable[tuple[int, float, stub_driver.Log]], arch: int) -> list[dict[str, Any]]:
    """One row for each distinct kernel of logs (rank, dropout probability, launches)."""
    found: dict[str, dict[str, Any]] = {}
    for R, p, log in logs:
        for launch in log.launches:
            row = _row(launch, arch, R, p)
            found.setdefault(row["kernel"], row)
    return list(found.values())


def role(launch: stub_driver.Launch) -> str:
    """What a launch does in a step."""
    flags = launch.constexprs
    if launch.name == "ticketed_gemm":
        return "dX" if flags["IN_IS_B"] else "forward"
    if launch.name == "strips":
        return "dB, dS" if flags["SCALES"] else "dA"
    return launch.name


def _row(launch: stub_driver.Launch, arch: int, R: int, p: float) -> dict[str, Any]:
    kernel, found = launch.kernel, launch.kernel.resources
    dropout = p if launch.constexprs.get("DROPOUT") else 0.0
    rank = f" r{R}" if found.mma else ""
    name = f"sm_{arch} {role(launch)}{rank}" + (f" p{dropout}" if dropout else "")
    row = {
        "kernel": name,
        "config": _config(launch),
        "registers": found.registers,
        "spilled_bytes": found.local_bytes,
        "shared_bytes": found.shared_bytes,
        "ctas_per_sm": found.ctas_per_sm,
        "mma": sorted(found.mma),
        "instructions": found.instructions.total(),
        "main_loop": None,
        "loops": [dict(sorted(loop.by_class.items())) for loop in found.hot_loops],
    }
    if found.hot_loops:
        main = main_loop(launch)
        device = SPEEDS[arch]
        row["main_loop"] = found.hot_loops.index(main)
        row["issue_cycles"] = len(main.instructions) * kernel.num_warps // SCHEDULERS
        row["tensor_cycles"] = loop_flops(launch) // device.tensor_per_cycle
        if launch.name == "strips":
            bytes_a_cycle = _tile_bytes(launch) / row["issue_cycles"]
            row["issue_terabytes"] = round(
                bytes_a_cycle * device.multiprocessors * device.boost_clock / 1e12, 2
            )
    return row


def _config(launch: stub_driver.Launch) -> str:
    blocks = [
        f"{name.removeprefix('BLOCK_')}{launch.constexprs[name]}"
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_L", "BLOCK_K", "BLOCK_R", "ROWS")
        if name in launch.constexprs
    ]
    return f"{' '.join(blocks)} w{launch.kernel.num_warps} s{launch.kernel.num_stages}"


def main_loop(launch: stub_driver.Launch) -> sass.Loop:
    """The loop with most products; of equal ones that which loads most, as it loads both sides.

    The opcodes of tensor memory do not tell how large a product is.
    """
    warps = launch.kernel.num_warps

    def weight(loop: sass.Loop) -> tuple[int, int, int]:
        flops = flops_of_instructions(loop, warps) or 0
        return flops, loop.mma.total(), loop.by_class["global"]

    return max(launch.kernel.resources.hot_loops, key=weight)


def _tile_bytes(launch: stub_driver.Launch) -> int:
    c = launch.constexprs
    return int(c["BLOCK_M"] * c["BLOCK_L"] * launch.arguments["x_ptr"].dtype.itemsize)


def loop_flops(launch: stub_driver.Launch) -> int:
    """FLOPs of one iteration of the kernel's hottest loop, by its tile sizes."""
    c = launch.constexprs
    if launch.name == "ticketed_gemm":
        return int(2 * c["BLOCK_M"] * c["BLOCK_N"] * c["BLOCK_K"])
    return int(2 * c["BLOCK_M"] * c["BLOCK_L"] * c["BLOCK_R"] * (c["PROJECTS"] + c["OUTER"]))


def flops_of_instructions(loop: sass.Loop, num_warps: int) -> int | None:
    """The same by its instructions; None on tensor memory, whose shapes are not in the opcode."""
    total = 0
    for instruction in loop.instructions:
        if not instruction.is_mma:
            continue
        match = _SHAPE.match(instruction.opcode)
        if match is None:
            return None
        m, n, k = (int(extent) for extent in match.groups() if extent)
        total += 2 * m * n * k * num_warps // _WARPS_OF_MMA[instruction.base]
    return total
