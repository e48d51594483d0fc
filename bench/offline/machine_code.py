"""Machine code of every kernel of a step: registers, spills, occupancy, instructions.

Of the main loop (the K-loop over W; in strips the walk over rows): the instructions of one
iteration by class, the cycles in which a multiprocessor issues them (4 schedulers, one warp
instruction a cycle each) and the cycles in which its tensor cores do the loop's products. Where the
first exceed the second, the loop is bound by instructions, not by products. Shrink tiles and
strips are bound by memory: for them the table shows the bandwidth that the issue cycles allow at
the boost clock.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bench.instruments import sass, stub_driver

from .rooflines import SPEEDS

if TYPE_CHECKING:
    from .variants import Variant

SCHEDULERS = 4
_SHAPE = re.compile(r"HMMA\.(16)(8)(16)\.|HGMMA\.(\d+)x(\d+)x(\d+)\.")
# Warps that one instruction multiplies for.
_WARPS_OF_MMA = {"HMMA": 1, "HGMMA": 4}


def rows(variants: Iterable[Variant], arch: int) -> list[dict[str, Any]]:
    """One row for each kernel that the variants launch. RuntimeError: two have the same name."""
    found: dict[int, dict[str, Any]] = {}
    for variant in variants:
        for launch in variant.log.launches:
            if id(launch.kernel) not in found:
                found[id(launch.kernel)] = _row(launch, variant, arch)
    names = Counter(row["kernel"] for row in found.values())
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        raise RuntimeError(f"kernels must have names of their own, got {repeated} more than once")
    return list(found.values())


def role(launch: stub_driver.Launch) -> str:
    """What a launch does in a step."""
    flags = launch.constexprs
    if launch.name == "ticketed_gemm":
        return "dX" if flags["IS_GRAD"] else "forward"
    if launch.name == "strips":
        return "dB, dS" if flags["IS_EXPAND"] else "dA"
    return launch.name


def _name(launch: stub_driver.Launch, variant: Variant, arch: int) -> str:
    """The name that distinguishes a kernel from the others of a device."""
    c, words = launch.constexprs, [f"sm_{arch}", role(launch)]
    if launch.name == "ticketed_gemm":
        members = launch.arguments["members"]
        if len(members) > 1:
            words.append(f"of {len(members)} layers")
        if members[0].absmax_ptr is not None:
            words.append("NF4")
    if launch.name in ("ticketed_gemm", "strips", "row_norms"):
        words.append(f"r{variant.R}")
    if launch.name == "ticketed_gemm" and not c["IS_GRAD"]:
        made = members[0].R_made
        words += ["without shrink"] * (made == 0) + [f"of {made}"] * (made > variant.R)
    if launch.name == "strips" and launch.arguments["R"] > variant.R:
        words.append(f"of {launch.arguments['R']}")
    if c.get("DROPOUT"):
        words.append(f"p{variant.dropout_p}")
    return " ".join([*words, *([variant.note] if variant.note else [])])


def _row(launch: stub_driver.Launch, variant: Variant, arch: int) -> dict[str, Any]:
    kernel, found = launch.kernel, launch.kernel.resources
    row = {
        "kernel": _name(launch, variant, arch),
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
    if launch.name == "nf4_decode":
        executed = found.instructions.total() * found.threads * launch.num_programs
        row["instructions_per_weight"] = round(executed / launch.arguments["num_elements"], 3)
    if not found.hot_loops:
        return row
    main = loop_of(launch, "gemm" if launch.name == "ticketed_gemm" else "walk")
    if main is not None:
        row["main_loop"] = found.hot_loops.index(main)
        row["main_loop_mma"] = sorted(main.mma)
        row["issue_cycles"] = issue_cycles(main, kernel.num_warps)
    if main is not None and launch.name in ("ticketed_gemm", "strips"):
        row["tensor_cycles"] = loop_flops(launch) // SPEEDS[arch].tensor_per_cycle
    memory_bound = {"ticketed_gemm": "shrink", "strips": "walk"}.get(launch.name)
    loop = loop_of(launch, memory_bound) if memory_bound else None
    if memory_bound and loop is not None:
        bytes_a_cycle = _tile_bytes(launch, memory_bound) / issue_cycles(loop, kernel.num_warps)
        row["issue_terabytes"] = round(bytes_a_cycle * _cycles_per_second(arch) / 1e12, 2)
    return row


def issue_seconds(launch: stub_driver.Launch, pass_name: str, arch: int) -> float:
    """Time in which all multiprocessors can issue the loop of a pass of a recorded launch, or the
    whole of a kernel without loops; 0 for a pass without products."""
    c, values, warps = launch.constexprs, launch.arguments, launch.kernel.num_warps
    if pass_name == "decode":
        count = launch.kernel.resources.instructions.total() * warps // SCHEDULERS
        return launch.num_programs * count / _cycles_per_second(arch)
    loop = loop_of(launch, pass_name.split()[0])
    if loop is None:
        return 0.0
    if launch.name == "strips":
        iterations = launch.grid[0] * _cdiv(values["M"], c["BLOCK_M"])
    elif pass_name == "shrink":
        row_tiles = _cdiv(values["M"], c["BLOCK_S"])
        iterations = row_tiles * sum(
            _cdiv(member.R_made, c["BLOCK_R"]) * _cdiv(member.K, c["BLOCK_K"])
            for member in values["members"]
        )
    else:
        tiles = _cdiv(values["M"], c["BLOCK_M"]) * _cdiv(values["N"], c["BLOCK_N"])
        iterations = tiles * sum(_cdiv(member.K, c["BLOCK_K"]) for member in values["members"])
    return iterations * issue_cycles(loop, warps) / _cycles_per_second(arch)


def issue_cycles(loop: sass.Loop, num_warps: int) -> int:
    """Cycles that an SM needs to issue one iteration of one CTA."""
    return len(loop.instructions) * num_warps // SCHEDULERS


def _cycles_per_second(arch: int) -> float:
    return SPEEDS[arch].multiprocessors * SPEEDS[arch].boost_clock


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _config(launch: stub_driver.Launch) -> str:
    blocks = [
        f"{name.removeprefix('BLOCK_')}{launch.constexprs[name]}"
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_L", "BLOCK_K", "BLOCK_R", "ROWS")
        if name in launch.constexprs
    ]
    return f"{' '.join(blocks)} w{launch.kernel.num_warps} s{launch.kernel.num_stages}"


def loop_of(launch: stub_driver.Launch, part: str) -> sass.Loop | None:
    """The loop of a pass: gemm, shrink (both of ticketed_gemm) or walk (strips).

    Of ticketed_gemm's loops the one that adds S · outᵀ is not pipelined, the K-loops are; that over
    W has more products than the shrink's or, where the opcode does not tell (tensor memory), loads
    by descriptors, or loads more. Each member of a launch has its own; the longest stands for all.
    None: the pass has no product.
    """
    loops = _pipelined_loops(launch)
    if launch.name != "ticketed_gemm":
        return loops[0] if loops else None
    products = len(launch.arguments["members"]) * _writes_y(launch)
    of_part = {"gemm": loops[:products], "shrink": loops[products:]}.get(part, [])
    return max(of_part, key=lambda loop: len(loop.instructions), default=None)


# By kernel: thousands of launches share a few dozen kernels, and parsing one is slow.
_loops: dict[int, tuple[stub_driver.CompiledKernel, list[sass.Loop]]] = {}


def _pipelined_loops(launch: stub_driver.Launch) -> list[sass.Loop]:
    """The loops whose loads run ahead, most products first. RuntimeError: not as many as passes."""
    kernel = launch.kernel
    if id(kernel) in _loops:
        return _loops[id(kernel)][1]

    def weight(loop: sass.Loop) -> tuple[int, int, bool, int]:
        flops = flops_of_instructions(loop, kernel.num_warps) or 0
        described = "UTMALDG" in loop.by_opcode
        return flops, loop.mma.total(), described, loop.by_class["global"]

    loops = sorted(kernel.resources.hot_loops, key=weight, reverse=True)
    if launch.name == "ticketed_gemm":
        loops = [loop for loop in loops if not _ASYNCHRONOUS.isdisjoint(loop.by_opcode)]
        members = launch.arguments["members"]
        shrinks = [m for m in members if m.in_ptr is not None and m.partials_ptr is None]
        expected = _writes_y(launch) * len(members) + len(shrinks)
        if len(loops) != expected:
            raise RuntimeError(f"{launch.name} must have {expected} K-loops, got {len(loops)}")
    _loops[id(kernel)] = kernel, loops
    return loops


_ASYNCHRONOUS = {"LDGSTS", "UTMALDG"}


def _tile_bytes(launch: stub_driver.Launch, part: str) -> int:
    c = launch.constexprs
    if part == "shrink":
        x = launch.arguments["members"][0].x_ptr
        return int(c["BLOCK_S"] * c["BLOCK_K"] * x.dtype.itemsize)
    return int(c["BLOCK_M"] * c["BLOCK_L"] * launch.arguments["x_ptr"].dtype.itemsize)


def loop_flops(launch: stub_driver.Launch) -> int:
    """FLOPs of one iteration of the kernel's hottest loop, by its tile sizes."""
    c = launch.constexprs
    if launch.name == "ticketed_gemm":
        return int(2 * c["BLOCK_M"] * c["BLOCK_N"] * c["BLOCK_K"])
    partials = launch.arguments["partials"]
    products = (partials.dS is not None) + (partials.T is not None)
    return int(2 * c["BLOCK_M"] * c["BLOCK_L"] * c["BLOCK_R"] * products)


def _writes_y(launch: stub_driver.Launch) -> bool:
    return launch.arguments.get("y_ptr") is not None


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
