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
# Below compute capability 8.0: no bfloat16, and none of the kernels.
OLDER = frozenset({"t4"})
# The CUDA context with its libraries, and fragmentation.
RESERVE = 1_000_000_000

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def card_bytes(name: str) -> int:
    """Bytes of a card. ValueError: it is not in the table."""
    if name.lower() not in CARDS:
        raise ValueError(
            f"card must be one of {', '.join(CARDS)}, got {name!r}; or give the memory"
        )
    return CARDS[name.lower()] * MIB


def parse_memory(text: str, name: str = "memory", such_as: str = "24GB or 80GiB") -> int:
    """Bytes of a size such as ``24GB``, ``24GiB`` or ``24`` (GB).

    ValueError: it is no size; names the argument `name`, with `such_as` as an example.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].lower() if match else ""
    size = int(float(match[1]) * _UNITS.get(unit or "gb", 0)) if match else 0
    if size <= 0:
        raise ValueError(f"{name} must be a size such as {such_as}, got {text!r}")
    return size


def fits(total: int, memory: int) -> bool:
    """Whether a plan of `total` bytes, and the reserve, fit in `memory`."""
    return total + RESERVE <= memory


def caveat(name: str, dtype: str) -> str:
    """What to say behind the name of a card that the kernels are not for; else nothing."""
    if name not in OLDER:
        return ""
    return (
        " (with --dtype float16, without the kernels)"
        if dtype == "bfloat16"
        else (" (without the kernels)")
    )
