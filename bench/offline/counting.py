"""Everything that is counted, for a selection of layers, sizes and devices, as rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.instruments import traffic
from lora_fast.tuning.rooflines import BY_ARCH, ROOFLINES

from . import band, contestants, layers, machine_code, variants
from .contestants import Case
from .operations import Step

COLUMNS = (
    *("layer", "M", "R", "weight", "p", "who", "arch"),
    *("launches_forward", "launches_backward", "flops", "bytes", "compulsory_bytes"),
    *("issued_bytes", "extra_bytes", "saved_bytes", "over_frozen", "over_frozen_slow"),
)
KEY = COLUMNS[:7]
MODELLED = ("unsloth", "lorafusion")
OURS = ("lora_fast", "lora_fast fused")


@dataclass(frozen=True)
class Selection:
    """Which cells of the tables to fill; ``archs`` of lora_fast's launches, ``code_archs`` and
    ``kinds`` (of variants.py) of its machine code."""

    shapes: tuple[layers.Shape, ...] = layers.SHAPES
    rows: tuple[int, ...] = (512, 2048, 8192)
    ranks: tuple[int, ...] = (16, 64, 256)
    weights: tuple[str, ...] = ("dense", "nf4")
    dropouts: tuple[float, ...] = (0.0, 0.1)
    archs: tuple[int, ...] = tuple(roofline.arch for roofline in ROOFLINES)
    code_archs: tuple[int, ...] = (80, 89, 90, 100, 120)
    kinds: tuple[str, ...] = tuple(variants.KINDS)

    def models(self) -> Iterator[tuple[layers.Shape, int, str, float]]:
        return itertools.product(self.shapes, self.ranks, self.weights, self.dropouts)


EVERYTHING = Selection()
FAST = Selection(
    shapes=layers.SHAPES[:2],
    rows=(8192,),
    ranks=(16,),
    archs=(90,),
    code_archs=(90,),
    kinds=("many rows", "in-GEMM"),
)
MAIN = Case(layers.SHAPES[0], 8192, 16, "dense", 0.0)


def others(selection: Selection) -> list[dict[str, Any]]:
    """Rows of the frozen layer, PEFT, Unsloth and LoRAFusion; the same for every device."""
    found = []
    for shape, R, weight, p in selection.models():
        for M in selection.rows:
            case = Case(shape, M, R, weight, p)
            frozen = contestants.stock(case, "frozen")
            found.append(_row(case, "frozen", frozen, frozen))
            for kind in ("peft", "peft fp32"):
                found.append(_row(case, kind, contestants.stock(case, kind), frozen))
            for graph in MODELLED:
                step = contestants.modelled(case, graph)
                if step is not None:
                    found.append(_row(case, graph, step, frozen))
    return found


def device(selection: Selection, arch: int) -> dict[str, list[dict[str, Any]]]:
    """Our rows and the machine code of one device, which share what is compiled for it."""
    found: dict[str, list[dict[str, Any]]] = {"counts": [], "kernels": [], "launches": []}
    if arch in selection.archs:
        found["counts"] = lora_fast(selection, arch)
    if arch in selection.code_archs:
        found |= code(selection, arch)
    return found


def lora_fast(selection: Selection, arch: int) -> list[dict[str, Any]]:
    """Our rows on one device."""
    found = []
    for shape, R, weight, p in selection.models():
        ours = None
        for M in selection.rows:
            case = Case(shape, M, R, weight, p)
            ours = ours or contestants.LoraFast(case)
            frozen = contestants.stock(case, "frozen")
            # The kernels alone at one rank: other ranks differ in the low rank's part.
            for who in OURS if selection.ranks[0] == R else OURS[:1]:
                step, _ = ours.step(case, arch, fused=who != "lora_fast")
                row = _row(case, who, step, frozen, arch)
                row["launches_forward"] = step.forward_launches
                row["launches_backward"] = step.launches - step.forward_launches
                row["compulsory_bytes"] = step.bytes - step.repeated_bytes
                row["issued_bytes"] = step.issued_bytes
                found.append(row)
    return found


def code(selection: Selection, arch: int) -> dict[str, list[dict[str, Any]]]:
    """Every kernel of the variants of one device, and the launches of a single linear in them."""
    # The kernels of groups take longest to compile: only where they are counted anyway.
    kinds = [kind for kind in selection.kinds if kind != "groups" or arch in selection.archs]
    found = list(variants.record(kinds, arch, selection.ranks, selection.dropouts))
    launches = {
        (v.case.M, v.case.weight): {
            "arch": arch,
            "M": v.case.M,
            "weight": v.case.weight,
            "forward": v.step.forward_launches,
            "backward": v.step.launches - v.step.forward_launches,
        }
        for v in found
        if v.case is not None and v.step is not None and v.case.shape is layers.SHAPES[0]
    }
    return {"kernels": machine_code.rows(found, arch), "launches": [*launches.values()]}


def breakdown(case: Case, arch: int) -> list[dict[str, Any]]:
    """The bytes of one of our steps, one row for each argument of each pass."""
    _, log = contestants.LoraFast(case).step(case, arch, fused=True)
    return [
        {
            "launch": f"{number} {machine_code.role(launch)}: {part.name}",
            "argument": argument,
            "read": part.read[argument],
            "written": part.written[argument],
            "flops": part.flops,
        }
        for number, launch in enumerate(log.launches, 1)
        for part in traffic.traffic(launch)
        for argument in sorted({*part.read, *part.written})
    ]


def _row(case: Case, who: str, step: Step, frozen: Step, arch: int | None = None) -> dict[str, Any]:
    rooflines = ROOFLINES if arch is None else (BY_ARCH[arch],)
    return {
        "layer": case.shape.name,
        "M": case.M,
        "R": case.R,
        "weight": case.weight,
        "p": case.dropout_p,
        "who": who,
        "arch": arch,
        "launches_forward": len(step.forward),
        "launches_backward": len(step.backward),
        "flops": step.flops,
        "bytes": step.bytes,
        "compulsory_bytes": step.bytes,
        "issued_bytes": None,
        "extra_bytes": step.bytes - frozen.bytes,
        "saved_bytes": step.saved_bytes,
        "over_frozen": band.over_frozen(step, frozen, rooflines, 1.0),
        "over_frozen_slow": band.over_frozen(step, frozen, rooflines, band.SLOW),
    }
