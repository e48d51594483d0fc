"""Graphics cards and their memory."""

from __future__ import annotations

import re

MIB = 1 << 20

# Memory in MiB as nvidia-smi and rocm-smi show it.
CARDS: dict[str, int] = {
    "t4": 15360,
    "rtx3090": 24576,
    "rtx4090": 24564,
    "rtx5090": 32607,
    "l4": 23034,
    "a10g": 23028,
    "a6000": 49140,
    "l40s": 46068,
    "a100-40": 40960,
    "a100-80": 81920,
    "h100": 81559,
    "h200": 143771,
    "b200": 183359,
    "mi300x": 196592,
}
# The CUDA context with its libraries, and what the allocator cannot hand out again.
RESERVE = 1_000_000_000

_UNITS = {"mb": 10**6, "gb": 10**9, "mib": 1 << 20, "gib": 1 << 30}


def card_bytes(name: str) -> int:
    """Bytes of a card. ValueError: it is not in the table."""
    if name.lower() not in CARDS:
        raise ValueError(
            f"card must be one of {', '.join(CARDS)}, got {name!r}; or give the memory"
        )
    return CARDS[name.lower()] * MIB


def parse_memory(text: str) -> int:
    """Bytes of a size such as ``24GB``, ``24GiB`` or ``24`` (GB). ValueError: it is no size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].lower() if match else ""
    if match is None or (unit and unit not in _UNITS) or float(match[1]) <= 0:
        raise ValueError(f"memory must be a size such as 24GB or 80GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[unit or "gb"])


def fits(total: int, memory: int) -> bool:
    """Whether a plan of `total` bytes, and the reserve, fit in `memory`."""
    return total + RESERVE <= memory
