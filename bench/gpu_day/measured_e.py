"""The table of e that the library's cost model reads, from the decisive step's rows.

    e = time of cuBLAS for the frozen product / time of a tile for the product with the low rank

It is written beside the results and, unless this was a rehearsal, into the package: from then on
the model chooses between Triton and cuBLAS on this architecture, where nothing may be timed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_fast.tuning import product_speed
from lora_fast.tuning.product_speed import Row

from .tables import best

FILE = product_speed.FILE.name


def write(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """The files written; none without a row of a tile."""
    found = list(rows(results))
    if not found:
        return []
    call = results["calls"][-1]
    major, minor = call["capability"]
    versions = {name: str(call[name]) for name in ("torch", "triton") if name in call}
    paths = [folder / FILE] if results["note"] else [folder / FILE, product_speed.FILE]
    for path in paths:
        product_speed.write(path, 10 * major + minor, call["name"], versions, found)
    return paths


def rows(results: Mapping[str, Any]) -> Iterator[Row]:
    """One row for each tile that was timed, as a graph where it could be captured."""
    measured = results["steps"].get("decisive", {}).get("rows", {})
    for row in measured.values():
        if row.get("direction") not in product_speed.DIRECTIONS or "tile" not in row:
            continue
        for name, contestant in row["contestants"].items():
            tile = row["tile"] if name == "lora_fast" else name
            times = best(contestant)
            if "/" in tile and times is not None and "over_baseline" in times:
                e = round(1 / times["over_baseline"]["median"], 4)
                yield Row(row["direction"], row["M"], row["K"], row["N"], tile, e)
