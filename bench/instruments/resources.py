"""Resources of a compiled kernel, read from its machine code without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field

from triton import knobs

from . import sass

KIB = 1024


@dataclass(frozen=True)
class DeviceLimits:
    """Limits of one streaming multiprocessor (on AMD: compute unit).

    ``shared_per_block`` is the opt-in limit of one CTA, ``shared_reserved`` what the driver adds to
    each CTA. NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability";
    AMD: CDNA3 and CDNA4 instruction set architecture guides.
    """

    shared_per_block: int
    shared_per_sm: int
    registers_per_sm: int
    threads_per_sm: int
    ctas_per_sm: int
    multiprocessors: int
    shared_reserved: int = KIB
    mma: str = ""


LIMITS: dict[int | str, DeviceLimits] = {
    80: DeviceLimits(163 * KIB, 164 * KIB, 65536, 2048, 32, 108, mma="HMMA"),
    86: DeviceLimits(99 * KIB, 100 * KIB, 65536, 1536, 16, 84, mma="HMMA"),
    89: DeviceLimits(99 * KIB, 100 * KIB, 65536, 1536, 24, 128, mma="HMMA"),
    90: DeviceLimits(227 * KIB, 228 * KIB, 65536, 2048, 32, 132, mma="HGMMA"),
    100: DeviceLimits(227 * KIB, 228 * KIB, 65536, 2048, 32, 148, mma="UTCHMMA"),
    120: DeviceLimits(99 * KIB, 100 * KIB, 65536, 1536, 24, 170, mma="HMMA"),
    "gfx942": DeviceLimits(64 * KIB, 64 * KIB, 131072, 2048, 32, 304, 0, "v_mfma"),
    "gfx950": DeviceLimits(160 * KIB, 160 * KIB, 131072, 2048, 32, 256, 0, "v_mfma"),
}
"""``mma`` is the instruction that 16-bit matrix products should become."""


@dataclass(frozen=True)
class Resources:
    """``local_bytes`` is the local memory of a thread: its stack, which holds spilled registers.

    ``instructions`` counts the kernel's machine code by class, ``mma`` its matrix products by kind.
    """

    registers: int
    local_bytes: int
    shared_bytes: int
    threads: int
    ctas_per_sm: int
    instructions: Counter[str] = field(repr=False)
    mma: Counter[str]
    hot_loops: list[sass.Loop] = field(repr=False)

    @property
    def hot_loop(self) -> sass.Loop:
        """The innermost loop with most matrix products. ValueError: there is none."""
        if not self.hot_loops:
            raise ValueError("no loop of the kernel holds a matrix product")
        return self.hot_loops[0]


def limits_of(arch: int | str) -> DeviceLimits:
    """The limits of a device. ValueError: it is not in the table."""
    if arch not in LIMITS:
        raise ValueError(f"arch must be one of {list(LIMITS)}, got {arch!r}")
    return LIMITS[arch]


def ctas_per_sm(arch: int | str, registers: int, shared_bytes: int, threads: int) -> int:
    """CTAs that fit on one multiprocessor at a time; registers go to warps in units of 8 × 32."""
    limits = limits_of(arch)
    registers_per_cta = _round_up(max(registers, 1), 8) * _round_up(threads, 32)
    shared_per_cta = _round_up(shared_bytes + limits.shared_reserved, 128)
    return min(
        limits.registers_per_sm // registers_per_cta,
        limits.shared_per_sm // shared_per_cta if shared_per_cta else limits.ctas_per_sm,
        limits.threads_per_sm // threads,
        limits.ctas_per_sm,
    )


def of_cubin(cubin: bytes, arch: int, threads: int, shared_bytes: int) -> Resources:
    """Resources of the one kernel in a cubin. ``shared_bytes``: what its launch asks for."""
    usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", _cuobjdump(cubin, "-res-usage")))
    registers = int(usage["REG"])
    instructions = sass.parse(sass_of(cubin))
    return Resources(
        registers=registers,
        local_bytes=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared_bytes=shared_bytes,
        threads=threads,
        ctas_per_sm=ctas_per_sm(arch, registers, shared_bytes, threads),
        instructions=Counter(i.kind for i in instructions),
        mma=Counter(i.base for i in instructions if i.is_mma),
        hot_loops=sass.hot_loops(instructions),
    )


def sass_of(cubin: bytes) -> str:
    """The machine code of a cubin, as cuobjdump prints it."""
    return _cuobjdump(cubin, "-sass")


def of_amdgcn(assembly: str, threads: int, shared_bytes: int, arch: str) -> Resources:
    """Resources of the one kernel in AMD assembly text; its instructions are not analysed."""
    vector = int(_amd_metadata(assembly, "vgpr_count"))
    return Resources(
        registers=vector,
        local_bytes=int(_amd_metadata(assembly, "private_segment_fixed_size")),
        shared_bytes=shared_bytes,
        threads=threads,
        ctas_per_sm=ctas_per_sm(arch, vector, shared_bytes, threads),
        instructions=Counter(),
        mma=Counter(re.findall(r"^\s+(v_mfma)_", assembly, re.MULTILINE)),
        hot_loops=[],
    )


def _amd_metadata(assembly: str, key: str) -> str:
    values = re.findall(rf"^\s+\.{key}:\s+(\d+)$", assembly, re.MULTILINE)
    if len(values) != 1:
        raise ValueError(f"assembly must describe one kernel, got {len(values)} values of {key}")
    return values[0]


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        command = [knobs.nvidia.cuobjdump.path, option, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
