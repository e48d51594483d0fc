"""Sizes such as 24GB."""

from __future__ import annotations

import re

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


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
