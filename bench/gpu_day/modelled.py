"""The values that `python -m bench.offline` modelled for a measured case, from its results."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from bench.offline import contestants, layers
from lora_fast.tuning.rooflines import BY_ARCH, Roofline

_KEPT = Path(__file__).resolve().parents[1] / "results" / "offline" / "results.json"
_LAYERS = {
    "Llama-3-8B": "Llama-3-8B and Mistral-7B layer",
    "Qwen3-8B": "Qwen3-8B layer",
}
_KEY = ("layer", "M", "R", "weight", "p", "who")


class Modelled:
    """Modelled ratios and times on the roofline of one architecture; nothing for others."""

    def __init__(self, arch: int | None, kept: Path = _KEPT) -> None:
        self.roofline: Roofline | None = BY_ARCH.get(arch or 0)
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        if self.roofline is None or not kept.is_file():
            return
        data = json.loads(kept.read_text())
        for values in data["counts"]:
            row = dict(zip(data["columns"], values, strict=True))
            if row["arch"] in (None, self.roofline.arch):
                self._rows[tuple(row[name] for name in _KEY)] = row

    def row(self, measured: dict[str, Any], who: str) -> dict[str, Any] | None:
        """The counted row of a contestant in a measured row; None if there is none."""
        layer = _LAYERS.get(measured.get("layer", ""))
        if layer is None and (measured.get("K"), measured.get("N")) == (4096, 4096):
            layer = "linear 4096x4096" if measured.get("direction") == "forward+backward" else None
        if layer is None:
            return None
        case = (layer, *(measured[name] for name in ("M", "R", "weight", "p")))
        if who == measured["baseline"]:
            who = "frozen"
        elif who == "frozen":
            return None  # the dense layer beside an NF4 one
        return self._rows.get((*case, who))

    def over_floor(self, measured: dict[str, Any], who: str) -> float | None:
        """Modelled time over that of the frozen layer, as it is stored."""
        row = self.row(measured, who)
        if row is None or self.roofline is None:
            return None
        ratio: float | None = row["over_frozen"].get(self.roofline.name)
        return ratio

    def extra_seconds(self, measured: dict[str, Any], who: str) -> float | None:
        """Modelled time beyond the frozen layer's."""
        ratio, row = self.over_floor(measured, who), self.row(measured, who)
        if ratio is None or row is None or self.roofline is None:
            return None
        shape = next(shape for shape in layers.SHAPES if shape.name == row["layer"])
        case = contestants.Case(shape, row["M"], row["R"], row["weight"], row["p"])
        return (ratio - 1.0) * _floor_seconds(case, self.roofline)

    def bytes_moved(self, measured: dict[str, Any], who: str) -> int | None:
        """Bytes between memory and the kernels, counted."""
        row = self.row(measured, who)
        return None if row is None else int(row["bytes"])


@functools.cache
def _floor_seconds(case: contestants.Case, roofline: Roofline) -> float:
    return roofline.total(contestants.stock(case, "frozen").operations)
