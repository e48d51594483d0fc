"""Machine code of every kernel of a step: registers, spills, occupancy, instructions.

Of the main loop (the K-loop over W; in strips the walk over rows): the instructions of one
iteration by class, the cycles in which a multiprocessor issues them (4 schedulers, one warp
instruction a cycle each) and the cycles in which its tensor cores do the loop's products. Where the
first exceed the second, the loop is bound by instructions, not by products. Shrink tiles and
strips are bound by memory: for them the table shows the bandwidth that the issue cycles allow at
the boost clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bench.instruments import stub_driver

from .issue import cycles_per_second, issue_cycles, loop_flops, loop_of, tensor_per_cycle

if TYPE_CHECKING:
    from .variants import Variant


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
    if launch.name == "expand":
        return "dS A" if flags["IS_GRAD"] else "S Q"
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
    others = launch.arguments.get("others") if launch.name == "strips" else None
    if others:
        words.append(f"of {1 + len(others)} layers")
    if launch.name in ("ticketed_gemm", "strips", "row_norms", "shrink", "expand"):
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
        row["tensor_cycles"] = loop_flops(launch) // tensor_per_cycle(arch)
    memory_bound = {"ticketed_gemm": "shrink", "strips": "walk"}.get(launch.name)
    loop = loop_of(launch, memory_bound) if memory_bound else None
    if memory_bound and loop is not None:
        bytes_a_cycle = _tile_bytes(launch, memory_bound) / issue_cycles(loop, kernel.num_warps)
        row["issue_terabytes"] = round(bytes_a_cycle * cycles_per_second(arch) / 1e12, 2)
    return row


def _config(launch: stub_driver.Launch) -> str:
    blocks = [
        f"{name.removeprefix('BLOCK_')}{launch.constexprs[name]}"
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_L", "BLOCK_K", "BLOCK_R", "ROWS")
        if name in launch.constexprs
    ]
    return f"{' '.join(blocks)} w{launch.kernel.num_warps} s{launch.kernel.num_stages}"


def _tile_bytes(launch: stub_driver.Launch, part: str) -> int:
    c = launch.constexprs
    if part == "shrink":
        x = launch.arguments["members"][0].x_ptr
        return int(c["BLOCK_S"] * c["BLOCK_K"] * x.dtype.itemsize)
    return int(c["BLOCK_M"] * c["BLOCK_L"] * launch.arguments["x_ptr"].dtype.itemsize)
