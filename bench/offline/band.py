"""Modelled times as a band: what is not known is e, how fast Triton multiplies beside cuBLAS.

    e = time of cuBLAS for a product ÷ time of a Triton kernel for the same product

Published values lie between 0.65 and 0.99, by device and shape. The times of ``over_frozen`` are
those of e = 1; a contestant whose products with W are Triton's gets slower as e falls, one that
calls cuBLAS does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from . import contestants, layers
from .contestants import Case
from .operations import Operation, Step
from .rooflines import ROOFLINES, Roofline

SLOW = 0.85
TRITON_PRODUCTS = {
    "lora_fast": ("ticketed_gemm",),
    "lorafusion": ("x W + S B", "dY W + dS A"),
}
"""By contestant: the operations that hold a product with W and are no call of cuBLAS."""


def seconds(who: str, operations: Iterable[Operation], roofline: Roofline, e: float) -> float:
    """Modelled time of a contestant's operations, one after the other."""
    slowed = TRITON_PRODUCTS.get(who, ())
    return sum(
        roofline.seconds(replace(op, flops=op.flops / e) if op.name in slowed else op)
        for op in operations
    )


def rows() -> list[dict[str, Any]]:
    """The times at e = SLOW of those who depend on it: dense layers, M = 8192, r = 16."""
    found = []
    for shape in layers.SHAPES[:2]:
        case = Case(shape, 8192, 16, "dense", 0.0)
        frozen = contestants.stock(case, "frozen")
        ours = contestants.LoraFast(case)
        steps = {
            "lora_fast": {r: ours.step(case, r.arch)[0] for r in ROOFLINES},
            "lorafusion": dict.fromkeys(ROOFLINES, _modelled(case, "lorafusion")),
        }
        for who, by_device in steps.items():
            times = {
                r.name: round(
                    seconds(who, step.operations, r, SLOW)
                    / seconds("frozen", frozen.operations, r, SLOW),
                    4,
                )
                for r, step in by_device.items()
            }
            found.append({"layer": shape.name, "who": who, "e": SLOW, "over_frozen": times})
    return found


def _modelled(case: Case, graph: str) -> Step:
    step = contestants.modelled(case, graph)
    assert step is not None
    return step
