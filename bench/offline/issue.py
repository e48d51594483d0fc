"""The loops of a kernel, and the cycles in which a multiprocessor issues them."""

from __future__ import annotations

import math
import re

from bench.instruments import sass, stub_driver
from lora_fast.tuning.rooflines import BY_ARCH

SCHEDULERS = 4
# Of a GeForce RTX 5090, which has no roofline: multiprocessors and boost clock.
_SPEED_OF_120 = 170, 2.41e9, 512

_SHAPE = re.compile(r"HMMA\.(16)(8)(16)\.|HGMMA\.(\d+)x(\d+)x(\d+)\.")

# Warps that one instruction multiplies for.
_WARPS_OF_MMA = {"HMMA": 1, "HGMMA": 4}


def issue_seconds(launch: stub_driver.Launch, pass_name: str, arch: int) -> float:
    """Time in which all multiprocessors can issue the loop of a pass of a recorded launch, or the
    whole of a kernel without loops; 0 for a pass without products."""
    c, values, warps = launch.constexprs, launch.arguments, launch.kernel.num_warps
    if pass_name == "decode":
        count = launch.kernel.resources.instructions.total() * warps // SCHEDULERS
        return launch.num_programs * count / cycles_per_second(arch)
    if launch.name not in ("ticketed_gemm", "strips", "shrink"):
        return 0.0
    loop = loop_of(launch, pass_name.split()[0])
    if loop is None:
        return 0.0
    if launch.name == "strips":
        iterations = launch.grid[0] * _cdiv(values["M"], c["BLOCK_M"])
    elif launch.name == "shrink":
        iterations = launch.num_programs * _cdiv(values["K"], c["BLOCK_K"])
    elif pass_name == "shrink":
        row_tiles = _cdiv(values["M"], c["BLOCK_S"])
        iterations = row_tiles * sum(
            _cdiv(member.R_made, c["BLOCK_R"]) * _cdiv(member.K, c["BLOCK_K"])
            for member in values["members"]
        )
    else:
        tiles = _cdiv(values["M"], c["BLOCK_M"]) * _cdiv(values["N"], c["BLOCK_N"])
        iterations = tiles * sum(_cdiv(member.K, c["BLOCK_K"]) for member in values["members"])
    return iterations * issue_cycles(loop, warps) / cycles_per_second(arch)


def issue_cycles(loop: sass.Loop, num_warps: int) -> int:
    """Cycles that an SM needs to issue one iteration of one CTA."""
    return len(loop.instructions) * num_warps // SCHEDULERS


def cycles_per_second(arch: int) -> float:
    multiprocessors, clock, _ = _speed(arch)
    return multiprocessors * clock


def tensor_per_cycle(arch: int) -> int:
    """FLOPs of one multiprocessor's tensor cores in a clock."""
    return _speed(arch)[2]


def _speed(arch: int) -> tuple[int, float, int]:
    if arch == 120:
        return _SPEED_OF_120
    roofline = BY_ARCH[arch]
    # Data sheets round; a multiprocessor's FLOPs are a power of two.
    per_cycle = 1 << round(math.log2(roofline.tensor_per_clock))
    return roofline.multiprocessors, roofline.clock, per_cycle


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


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


def loop_flops(launch: stub_driver.Launch) -> int:
    """FLOPs of one iteration of the kernel's hottest loop, by its tile sizes."""
    c = launch.constexprs
    if launch.name == "ticketed_gemm":
        return int(2 * c["BLOCK_M"] * c["BLOCK_N"] * c["BLOCK_K"])
    partials = launch.arguments["partials"]
    products = (partials.dS is not None) + (partials.T is not None)
    return int(2 * c["BLOCK_M"] * c["BLOCK_L"] * c["BLOCK_R"] * products)


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


def _writes_y(launch: stub_driver.Launch) -> bool:
    return launch.arguments.get("y_ptr") is not None
