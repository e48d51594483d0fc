"""One case alone: its launches, bytes and modelled times, and the machine code of its kernels.

    python -m bench.offline --case linear,8192,16,nf4 --arch 90

A case is LAYER,M,R,WEIGHT or LAYER,M,R,WEIGHT,P: a part of a layer's name in layers.SHAPES, the
rows of x, the rank, dense or nf4, and the dropout, 0 unless given.
"""

from __future__ import annotations

from typing import Any

from lora_fast.tuning.rooflines import BY_ARCH

from . import counting, layers, machine_code, variants
from .contestants import Case
from .markdown import band_of, kernel_table, table

FORM = "LAYER,M,R,WEIGHT[,P]"


def parse(text: str) -> Case:
    """The case that `text` names. ValueError: what of it is wrong."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) not in (4, 5):
        raise ValueError(f"case must be {FORM}, got {text!r}")
    name, M, R, weight, p = (*parts, "0")[:5]
    shapes = [shape for shape in layers.SHAPES if name.lower() in shape.name.lower()]
    if len(shapes) != 1:
        known = "; ".join(shape.name for shape in layers.SHAPES)
        raise ValueError(f"the layer must be a part of one of: {known}; got {name!r}")
    if weight not in ("dense", "nf4"):
        raise ValueError(f"the weight must be dense or nf4, got {weight!r}")
    try:
        case = Case(shapes[0], int(M), int(R), weight, float(p))
    except ValueError:
        raise ValueError(f"M and R must be integers and P a number, got {text!r}") from None
    if case.M < 1 or case.R < 1 or not 0.0 <= case.dropout_p < 1.0:
        raise ValueError(f"M and R must be positive and P in [0, 1), got {text!r}")
    return case


def count(case: Case, arch: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of `case` by part, as :mod:`bench.offline.tasks` has those of a whole selection.

    Raises ValueError for an architecture without a roofline.
    """
    if arch not in BY_ARCH:
        raise ValueError(f"arch must be one of {', '.join(map(str, BY_ARCH))}, got {arch}")
    selection = counting.Selection(
        (case.shape,), (case.M,), (case.R,), (case.weight,), (case.dropout_p,), (arch,)
    )
    counts = counting.others(selection) + counting.lora_fast(selection, arch)
    kernels = machine_code.rows([variants.of_case(case, arch)], arch)
    return {"counts": counts, "launches": [], "kernels": kernels}


def text(case: Case, arch: int, found: dict[str, list[dict[str, Any]]]) -> str:
    """What was counted, as tables."""
    device = BY_ARCH[arch].name
    lines = [
        (
            f"{row['who']} (model)" if row["who"] in counting.MODELLED else row["who"],
            f"{row['launches_forward']} + {row['launches_backward']}",
            f"{row['extra_bytes'] / 1e6:.0f}",
            f"{row['saved_bytes'] / 1e6:.0f}",
            band_of(row, device, digits=3),
        )
        for row in found["counts"]
    ]
    head = ("", "launches", "HBM MB over frozen", "saved for backward, MB")
    return "\n\n".join(
        [
            f"# {case}, sm_{arch}: counted and modelled, not measured",
            table((*head, f"time over frozen, {device}"), lines),
            kernel_table(found["kernels"]),
        ]
    )
