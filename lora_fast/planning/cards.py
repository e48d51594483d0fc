"""Graphics cards and their memory."""

from __future__ import annotations

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


def card_bytes(name: str) -> int:
    """Bytes of a card. ValueError: it is not in the table."""
    if name.lower() not in CARDS:
        raise ValueError(
            f"card must be one of {', '.join(CARDS)}, got {name!r}; or give the memory"
        )
    return CARDS[name.lower()] * MIB


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
