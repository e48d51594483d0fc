"""The linears of a decoder layer with the activation of its MLP, as each contestant computes both.

    frozen       Hugging Face's LlamaMLP: SiLU and a product, five operations over M × I
    peft         stock PEFT; peft + liger: with Liger's SwiGLU, one kernel in each direction, which
                 saves gate and up and writes their gradients in place
    unsloth      its graph, with its two kernels; the backward one writes h again, too
    lorafusion   its linears, and Hugging Face's activation
    nemo         a model of its graph, which has the activation in it; nemo, op fuser: with the sums
                 in the products
    lora_fast    accelerated PEFT layers, whose activation carries the low rank

All operations are counted, and modelled times are those of the table of linears.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lora_fast.tuning.rooflines import BY_ARCH, ROOFLINES

from . import band, contestants, layers, nemo_graph
from .contestants import Case
from .operations import Operation, Step

LAYER = layers.SHAPES[1]
WHO = (
    "frozen", "peft", "peft + liger", "unsloth", "lorafusion", *nemo_graph.KINDS, "lora_fast",
)  # fmt: skip
CASES = tuple(Case(LAYER, 8192, 16, weight, 0.0) for weight in ("dense", "nf4"))


def rows(cases: tuple[Case, ...] = CASES, who: tuple[str, ...] = WHO) -> list[dict[str, Any]]:
    """One row for each contestant, of ours one for each device."""
    found = []
    for case in cases:
        frozen = contestants.stock(replace(case, activates=True), "frozen")
        steps = {name: step(case, name) for name in who if name != "lora_fast"}
        found += [_row(case, name, of, frozen) for name, of in steps.items() if of is not None]
        if "lora_fast" in who:
            ours = contestants.LoraFast(replace(case, activates=True))
            for roofline in ROOFLINES:
                counted, _ = ours.step(replace(case, activates=True), roofline.arch)
                found.append(_row(case, "lora_fast", counted, frozen, roofline.arch))
    return found


def step(case: Case, who: str) -> Step | None:
    """The step of anybody but us; None where they have no fused path."""
    if who in contestants.STOCK:
        return contestants.stock(replace(case, activates=True), who)
    if who in nemo_graph.KINDS:
        dense = case.weight == "dense"
        return nemo_graph.step(case.shape, case.M, case.R, who) if dense else None
    element = layers.DTYPE.itemsize
    passes, kept = case.M * case.shape.intermediate * element, 2
    forward = [Operation("swiglu", 0, 2 * passes, passes)]
    backward = [Operation("swiglu backward", 0, 3 * passes, 2 * passes)]
    if who == "peft + liger":
        linears = contestants.stock(case, "peft")
    else:
        modelled = contestants.modelled(case, who)
        if modelled is None:
            return None
        linears = modelled
    if who == "unsloth":
        backward = [Operation("swiglu backward", 0, 3 * passes, 3 * passes)]
    elif who == "lorafusion":
        hugging_face = _activation(case)
        forward, backward = hugging_face.forward, hugging_face.backward
        # SiLU saves gate, the product SiLU's result and up.
        kept = 3
    return Step(
        linears.forward + forward, linears.backward + backward, linears.saved_bytes + kept * passes
    )


def _activation(case: Case) -> Step:
    """What the frozen layer has beside its linears."""
    whole = contestants.stock(replace(case, activates=True), "frozen")
    products = ("aten::mm", "aten::addmm", "aten::linear")
    of = [
        [op for op in part if not op.flops and not op.name.startswith(products)]
        for part in (whole.forward, whole.backward)
    ]
    return Step(*(_over(case, part) for part in of))


def _over(case: Case, operations: list[Operation]) -> list[Operation]:
    """Those over M × I elements."""
    written = case.M * case.shape.intermediate * layers.DTYPE.itemsize
    return [op for op in operations if op.written == written]


def _row(case: Case, who: str, step: Step, frozen: Step, arch: int | None = None) -> dict[str, Any]:
    rooflines = ROOFLINES if arch is None else (BY_ARCH[arch],)
    launches = getattr(step, "launches", len(step.operations))
    return {
        "layer": case.shape.name,
        "M": case.M,
        "R": case.R,
        "weight": case.weight,
        "who": who,
        "arch": arch,
        "launches": launches,
        "bytes": step.bytes,
        "saved_bytes": step.saved_bytes,
        "over_frozen": band.over_frozen(step, frozen, rooflines, 1.0),
    }
