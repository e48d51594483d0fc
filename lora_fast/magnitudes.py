"""Counts of parameters, sizes of memory and lists of names in a few words."""

from __future__ import annotations

from collections.abc import Sequence

_PARAMETERS = ("", "K", "M", "B", "T")
_BYTES = ("B", "kB", "MB", "GB", "TB")


def short_count(count: int) -> str:
    """``49.2 K``, ``1.24 M``, ``8.03 B``: a number of parameters."""
    return _in_units(count, _PARAMETERS)


def short_size(size: float) -> str:
    """``1.23 GB``: bytes in decimal units."""
    return _in_units(size, _BYTES)


def first_of(names: Sequence[str]) -> str:
    """``layers.0.mlp.gate and 3 more``: names of layers, without the prefix of PEFT."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return names[0].removeprefix("base_model.model.") + more


def _in_units(value: float, units: tuple[str, ...]) -> str:
    """The largest unit of which `value` has one, once it is rounded to three digits."""
    step = 0
    while value >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    digits = f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
    return f"{digits} {units[step]}".rstrip()
