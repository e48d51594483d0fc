"""Faults of asynchronous products (wgmma, tcgen05.mma), read from a kernel's PTX: operands written
through another proxy, and accumulators that make ptxas wait for each product.

Products read shared memory through the async proxy. What st.shared or cp.async wrote there went
through the generic proxy and is visible only after fence.proxy.async ("Async proxy", PTX ISA). A
missing fence changes no value on a machine whose timing happens to be right.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lora_fast.kernels.triton_version import VERSION
from triton.backends.nvidia.compiler import get_ptxas

_WRITE = re.compile(r"\b(st\.shared|stmatrix|cp\.async\.c[ag]\.shared|(?:atom|red)\.shared)")
_FENCE = re.compile(r"\bfence\.proxy\.async")
_READ = re.compile(r"\b(wgmma\.mma_async|tcgen05\.(mma|cp)|cp\.async\.bulk\S*\.global\.shared)\b")
_ANY = re.compile("|".join(pattern.pattern for pattern in (_WRITE, _FENCE, _READ)))
_LABEL = re.compile(r"^(\$L__BB\w+):")
_BRANCH = re.compile(r"(@\S+\s+)?bra(?:\.uni)?\s+(\$L__BB\w+)")
_END = re.compile(r"^\s*(ret|exit|trap);")
_REMARK = re.compile(r"\((C75\d\d)\)")
# From 3.6 on Triton has several.
_PTXAS = get_ptxas(*((90,) if VERSION >= (3, 6) else ()))


@dataclass(frozen=True)
class Unfenced:
    """A line that reads shared memory through the async proxy, and the kinds of generic writes
    from which a path leads there without a fence."""

    line: str
    writes: frozenset[str]


@dataclass
class _Block:
    lines: list[str]  # those that write, fence or read
    successors: list[str]


def unfenced(ptx: str) -> list[Unfenced]:
    """Every asynchronous read that generic writes reach without a fence, on any path.

    Addresses are not compared: a write that no product reads counts as well.
    """
    blocks = _blocks(ptx)
    reached: dict[str, frozenset[str]] = dict.fromkeys(blocks, frozenset())
    pending = list(blocks)
    while pending:
        name = pending.pop()
        written = _walk(blocks[name], reached[name], [])
        for successor in blocks[name].successors:
            if not written <= reached[successor]:
                reached[successor] |= written
                pending.append(successor)
    found: list[Unfenced] = []
    for name, block in blocks.items():
        _walk(block, reached[name], found)
    return found


@functools.cache
def serialised(ptx: str) -> tuple[str, ...]:
    """ptxas' remarks (C75xx) on wgmma instructions of sm_90 that it serialises, and why.

    Triton discards ptxas' output, so it is run again, for a kernel that has such instructions.
    """
    if "wgmma" not in ptx:
        return ()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [_PTXAS.path, "-v", "--gpu-name=sm_90a", str(path), "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return tuple(line for line in said.splitlines() if _REMARK.search(line))


def _walk(block: _Block, written: frozenset[str], found: list[Unfenced]) -> frozenset[str]:
    """The writes that leave a block unfenced; appends the reads that they reach to `found`."""
    for line in block.lines:
        if _FENCE.search(line):
            written = frozenset()
        elif match := _WRITE.search(line):
            written |= {match[1]}
        elif written and _READ.search(line):
            found.append(Unfenced(line.strip(), written))
    return written


def _blocks(ptx: str) -> dict[str, _Block]:
    """The basic blocks of the kernel, by label, in their order."""
    name, block = "entry", _Block([], [])
    blocks = {name: block}
    falls_through = True
    for line in ptx[ptx.index(".entry") :].splitlines():
        if label := _LABEL.match(line):
            if falls_through:
                block.successors.append(label[1])
            name, block, falls_through = label[1], _Block([], []), True
            blocks[name] = block
            continue
        if _ANY.search(line):
            block.lines.append(line)
        if branch := _BRANCH.search(line):
            block.successors.append(branch[2])
            if branch[1] is None:
                falls_through = False
            else:
                following = f"{name}+"
                block.successors.append(following)
                name, block = following, _Block([], [])
                blocks[name] = block
        elif _END.match(line):
            falls_through = False
    return blocks
