"""Modelled times as a band: what is not known is e, how fast Triton multiplies beside cuBLAS.

    e = time of cuBLAS for a product ÷ time of a Triton kernel for the same product

Published values lie between 0.65 and 0.99, by device and shape. Times are modelled at e = 1 and at
e = SLOW: a contestant whose products with W are Triton's gets slower, one that calls cuBLAS does
not.
"""

from __future__ import annotations

from collections.abc import Iterable

from lora_fast.tuning import cost_model
from lora_fast.tuning.rooflines import BY_ARCH, Roofline

from . import contestants
from .contestants import Case
from .operations import Operation, Step

SLOW = 0.85
# Passes over M × I elements that Hugging Face's SiLU and product make: SiLU reads one and writes
# one, the product reads two; backward, each of its gradients reads two, SiLU's, too.
_ACTIVATION_PASSES = 5 + 9


def over_frozen(
    step: Step, frozen: Step, rooflines: Iterable[Roofline], e: float
) -> dict[str, float]:
    """Modelled time over that of the frozen layer, by device."""
    return {
        r.name: round(seconds(step.operations, r, e) / seconds(frozen.operations, r, e), 4)
        for r in rooflines
    }


def seconds(operations: Iterable[Operation], roofline: Roofline, e: float) -> float:
    """Modelled device time of operations, one launch after the other."""
    each = [roofline.seconds(op, e) + cost_model.LAUNCH_SECONDS for op in operations]
    return sum(each)


def with_activation(case: Case, ratio: float, device: str) -> float:
    """The ratio for the linears of a decoder layer and its activation, as Hugging Face computes it;
    that of the linears alone is given."""
    roofline = next(r for r in BY_ARCH.values() if r.name == device)
    frozen = seconds(contestants.stock(case, "frozen").operations, roofline, 1.0)
    moved = _ACTIVATION_PASSES * case.M * case.shape.intermediate * 2
    # Forward: two launches; backward: three.
    activation = moved / roofline.copied + 5 * cost_model.LAUNCH_SECONDS
    return (ratio * frozen + activation) / (frozen + activation)
