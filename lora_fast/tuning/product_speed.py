"""How fast a Triton product with W is beside cuBLAS's.

    e = time of cuBLAS for the frozen product ÷ time of ours, the low-rank part included

Published values stand here, by architecture. Measured ones are in a file of the package that
``python -m bench.gpu_day`` writes: until it knows an architecture, cost_model.py does not choose
between Triton and cuBLAS by time.

    {"format": 1, "measured": {"90": {"device": …, "versions": {…}, "rows": [
        {"direction": "forward" | "dX", "M": …, "K": …, "N": …, "tile": …, "e": …}, …]}}}

A tile is named as plans name it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..kernels.launch_policy import SMALL_SHARED, TENSOR_MEMORY, GemmConfig

FILE = Path(__file__).with_name("measured_e.json")
FORMAT = 1
DIRECTIONS = ("forward", "dX")


class Published(NamedTuple):
    """The range of published values of e."""

    low: float
    high: float
    source: str


_BY_ARCH: dict[tuple[int, ...], Published] = {
    (80,): Published(0.89, 0.99, "triton issues 6523, 7085: tutorial 03, A100, 2304³ and above"),
    (90,): Published(
        0.76,
        0.97,
        "triton PR 5726 (0.76; persistent, with descriptors: 0.92), facebookexperimental/triton PR "
        "1038 (0.86; specialised by hand: 0.97), CentML/lorafusion issue 8 (this fusion: 0.95)",
    ),
    TENSOR_MEMORY: Published(
        0.65,
        0.93,
        "triton PR 6217 (0.65 to 0.90), facebookexperimental/triton PR 854 (0.77 to 0.93)",
    ),
    SMALL_SHARED: Published(0.95, 0.98, "LeetCUDA, hgemm: mma.sync written by hand, on an L20"),
}
_UNKNOWN = Published(0.65, 0.99, "none: the range of all others")


def published(arch: int | None) -> Published:
    """The published range of an architecture."""
    return next((found for archs, found in _BY_ARCH.items() if arch in archs), _UNKNOWN)


def tile_name(tile: GemmConfig) -> str:
    """``128x256x64/8/3 descriptors``; other than the usual 8 row blocks in a group are named."""
    sizes = "x".join(map(str, (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K)))
    name = f"{sizes}/{tile.num_warps}/{tile.num_stages}" + " descriptors" * tile.descriptors
    return name if tile.GROUP_M == 8 else f"{name} groups of {tile.GROUP_M}"


class Row(NamedTuple):
    """One measurement: X [M, K] times [K, N] with a tile, in a direction."""

    direction: str
    M: int
    K: int
    N: int
    tile: str
    e: float


def is_measured(arch: int | None) -> bool:
    """Whether e was measured on a device of this architecture."""
    return str(arch) in _measured()


def e_of(tile: GemmConfig, arch: int | None, direction: str, M: int, K: int, N: int) -> float:
    """e of a tile: measured at the nearest size, else the middle of the published range."""
    name = tile_name(tile)
    rows = [r for r in _measured().get(str(arch), ()) if (r.direction, r.tile) == (direction, name)]
    if not rows:
        low, high, _ = published(arch)
        return (low + high) / 2
    return min(rows, key=lambda r: _distance((r.M, r.K, r.N), (M, K, N))).e


def _distance(a: Sequence[int], b: Sequence[int]) -> float:
    return sum(abs(math.log(x / max(y, 1))) for x, y in zip(a, b, strict=True))


@functools.cache
def _measured() -> dict[str, tuple[Row, ...]]:
    return read(FILE)


def read(path: Path) -> dict[str, tuple[Row, ...]]:
    """The rows of a file by architecture; none if there is no file.

    Raises ValueError for what is not a file of this format.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {content['format']!r}")
        return {
            arch: tuple(map(_row, device["rows"])) for arch, device in content["measured"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must hold measured values of e, got {error!r}") from error


def _row(values: Mapping[str, Any]) -> Row:
    row = Row(**values)
    sizes = (row.M, row.K, row.N)
    if row.direction not in DIRECTIONS or not all(isinstance(s, int) and s > 0 for s in sizes):
        raise ValueError(f"a row must have a direction and sizes, got {dict(values)}")
    if not isinstance(row.tile, str) or not 0.0 < row.e < math.inf:
        raise ValueError(f"a row must have a tile and e > 0, got {dict(values)}")
    return row


def write(
    path: Path, arch: int, device: str, versions: Mapping[str, str], rows: Sequence[Row]
) -> None:
    """Put the rows of one architecture into a file, in place of earlier ones; the others stay."""
    known = json.loads(path.read_text())["measured"] if path.is_file() and read(path) else {}
    known[str(arch)] = {
        "device": device,
        "versions": dict(versions),
        "rows": [row._asdict() for row in rows],
    }
    content = {"format": FORMAT, "measured": dict(sorted(known.items()))}
    path.write_text(json.dumps(content, indent=1) + "\n")
