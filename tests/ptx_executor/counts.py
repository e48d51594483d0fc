"""What a launch did, counted."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from .machine.state import Launch


@dataclass
class Counts:
    """Counters of one launch while it runs."""

    blocks: collections.Counter[int] = field(default_factory=collections.Counter)  # by warps
    mma: collections.Counter[str] = field(default_factory=collections.Counter)
    missing_fences: collections.Counter[str] = field(default_factory=collections.Counter)
    flops: int = 0
    shared_read: int = 0
    shared_written: int = 0
    steps: int = 0  # blocks run by a batch


class RegionCounts(TypedDict):
    """Distinct bytes of an argument."""

    read: int
    written: int
    size: int


class LaunchCounts(TypedDict):
    """One launch.

    instructions: warp instructions by class of opcode, those with a false predicate included.
    global_*: bytes requested; *_unique: distinct ones, None unless `unique_bytes`. shared_*: bytes
    through shared memory; shared_bytes: what a CTA reserves. mma: mma.sync by warp, wgmma by
    warpgroup and tcgen05.mma each, with mma_flops operations. missing_fences: how often which
    instruction read shared memory without its fence.proxy.async. seconds: of the executor.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    arch: int
    seconds: float
    instructions: dict[str, int]
    warp_instructions: int
    global_read: int
    global_written: int
    global_atomic: int
    global_read_unique: int | None
    global_written_unique: int | None
    regions: dict[str, RegionCounts]
    shared_bytes: int
    shared_read: int
    shared_written: int
    mma: int
    mma_by_kind: dict[str, int]
    mma_flops: int
    missing_fences: dict[str, int]


class Report(TypedDict):
    """Totals over launches, which `details` holds; shared_bytes is the largest."""

    launches: int
    details: list[LaunchCounts]
    instructions: dict[str, int]
    warp_instructions: int
    global_read: int
    global_written: int
    global_atomic: int
    global_read_unique: int
    global_written_unique: int
    shared_bytes: int
    shared_read: int
    shared_written: int
    mma: int
    mma_flops: int
    missing_fences: dict[str, int]
    seconds: float


def of_launch(launch: Launch, arch: int, seconds: float) -> LaunchCounts:
    """The counts of a launch that has ended."""
    instructions: collections.Counter[str] = collections.Counter()
    for number, warps in launch.counts.blocks.items():
        for kind, count in launch.program.blocks[number].counts.items():
            instructions[kind] += count * warps
    memory, counts = launch.global_memory, launch.counts
    regions = _regions(launch) if memory.track else {}
    return LaunchCounts(
        kernel=launch.program.name,
        grid=launch.grid,
        threads=launch.threads,
        arch=arch,
        seconds=seconds,
        instructions=dict(instructions.most_common()),
        warp_instructions=instructions.total(),
        global_read=memory.nread,
        global_written=memory.nwritten,
        global_atomic=memory.natomic,
        global_read_unique=sum(r["read"] for r in regions.values()) if memory.track else None,
        global_written_unique=sum(r["written"] for r in regions.values()) if memory.track else None,
        regions=regions,
        shared_bytes=launch.program.shared_size,
        shared_read=counts.shared_read,
        shared_written=counts.shared_written,
        mma=counts.mma.total(),
        mma_by_kind=dict(counts.mma),
        mma_flops=counts.flops,
        missing_fences=dict(counts.missing_fences),
    )


def _regions(launch: Launch) -> dict[str, RegionCounts]:
    """By name; members of a tuple of arguments have one name and are added up."""
    found: dict[str, RegionCounts] = {}
    for region in launch.global_memory.regions:
        if region.name == "kernel parameters" or region.name.startswith("variable "):
            continue
        total = found.setdefault(region.name, RegionCounts(read=0, written=0, size=0))
        total["read"] += region.unique("r")
        total["written"] += region.unique("w")
        total["size"] += region.size
    return found


def of_all(launches: Iterable[LaunchCounts]) -> Report:
    """Totals."""
    details = list(launches)
    instructions: collections.Counter[str] = collections.Counter()
    missing: collections.Counter[str] = collections.Counter()
    for launch in details:
        instructions.update(launch["instructions"])
        named = {f"{launch['kernel']}: {ins}": n for ins, n in launch["missing_fences"].items()}
        missing.update(named)
    return Report(
        launches=len(details),
        details=details,
        instructions=dict(instructions),
        warp_instructions=sum(launch["warp_instructions"] for launch in details),
        global_read=sum(launch["global_read"] for launch in details),
        global_written=sum(launch["global_written"] for launch in details),
        global_atomic=sum(launch["global_atomic"] for launch in details),
        global_read_unique=sum(launch["global_read_unique"] or 0 for launch in details),
        global_written_unique=sum(launch["global_written_unique"] or 0 for launch in details),
        shared_bytes=max((launch["shared_bytes"] for launch in details), default=0),
        shared_read=sum(launch["shared_read"] for launch in details),
        shared_written=sum(launch["shared_written"] for launch in details),
        mma=sum(launch["mma"] for launch in details),
        mma_flops=sum(launch["mma_flops"] for launch in details),
        missing_fences=dict(missing),
        seconds=sum(launch["seconds"] for launch in details),
    )
