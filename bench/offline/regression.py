"""Compares a new count with the stored one and lists every regression."""

from __future__ import annotations

from typing import Any

from .counting import KEY, OURS

MORE_INSTRUCTIONS = 0.05
"""Fraction by which a kernel or its main loop may grow: compilers vary a little."""

_RISES = (
    ("launches_forward", "launches forward"),
    ("launches_backward", "launches backward"),
    ("saved_bytes", "bytes saved for backward"),
    ("bytes", "bytes moved"),
)
_DIRECTIONS = (("forward", "launches forward"), ("backward", "launches backward"))
_PARTS = ("counts", "launches", "kernels")


def regressions(
    new: dict[str, list[dict[str, Any]]], kept: dict[str, list[dict[str, Any]]]
) -> list[str]:
    """Regressions of ``new`` from ``kept``; rows missing in ``new`` are not compared.

    Both are {"counts": rows, "launches": rows, "kernels": rows}. A count that is not stored yet is
    a regression, too, so that somebody looks at it. Of a kernel that is not stored yet only a spill
    is one (`not_kept` lists them).
    """
    found = []
    known = {_key(row): row for row in kept["counts"]}
    for row in new["counts"]:
        if row["who"] not in OURS:
            continue
        if _key(row) not in known:
            found.append(f"{_describe(row)}: not in the kept results")
            continue
        found += [f"{_describe(row)}: {line}" for line in _risen(row, known[_key(row)], _RISES)]
    launches = {_key_of_launches(row): row for row in kept.get("launches", ())}
    for row in new["launches"]:
        before = launches.get(_key_of_launches(row), row)
        found += [
            f"sm_{row['arch']} M={row['M']} {row['weight']}: {line}"
            for line in _risen(row, before, _DIRECTIONS)
        ]
    kernels = {row["kernel"]: row for row in kept["kernels"]}
    for row in new["kernels"]:
        before = kernels.get(row["kernel"], {**row, "spilled_bytes": 0})
        found += [f"{row['kernel']}: {line}" for line in _worse_code(row, before)]
    return found


def not_kept(
    new: dict[str, list[dict[str, Any]]], kept: dict[str, list[dict[str, Any]]]
) -> list[str]:
    """The kernels of ``new`` that have no stored counterpart."""
    known = {row["kernel"] for row in kept["kernels"]}
    return [row["kernel"] for row in new["kernels"] if row["kernel"] not in known]


def differences(new: dict[str, list[dict[str, Any]]], kept: dict[str, list[dict[str, Any]]]) -> int:
    """How many of the new rows differ from the stored ones, for better or worse."""
    known = [row for part in _PARTS for row in kept.get(part, ())]
    return sum(row not in known for part in _PARTS for row in new[part])


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _describe(row: dict[str, Any]) -> str:
    return f"sm_{row['arch']} {row['layer']} M={row['M']} r={row['R']} {row['weight']} p={row['p']}"


def _key_of_launches(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["arch"], row["M"], row["weight"]


def _risen(
    new: dict[str, Any], old: dict[str, Any], names: tuple[tuple[str, str], ...]
) -> list[str]:
    return [
        f"{new[name]} {words}, {old[name]} before" for name, words in names if new[name] > old[name]
    ]


def _worse_code(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    found = []
    if new["spilled_bytes"] > old["spilled_bytes"]:
        found.append(f"spills {new['spilled_bytes']} bytes, {old['spilled_bytes']} before")
    if new["mma"] != old["mma"]:
        found.append(f"multiplies by {new['mma']}, by {old['mma']} before")
    if new["ctas_per_sm"] < old["ctas_per_sm"]:
        found.append(f"{new['ctas_per_sm']} CTAs on a multiprocessor, {old['ctas_per_sm']} before")
    if new["instructions"] > old["instructions"] * (1 + MORE_INSTRUCTIONS):
        found.append(f"{new['instructions']} instructions, {old['instructions']} before")
    now, before = _main_loop(new), _main_loop(old)
    if now > before * (1 + MORE_INSTRUCTIONS):
        found.append(f"{now} instructions in the main loop, {before} before")
    return found


def _main_loop(row: dict[str, Any]) -> int:
    return 0 if row["main_loop"] is None else sum(row["loops"][row["main_loop"]].values())
