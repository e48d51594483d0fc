"""The time of a plan, modelled, and the plan of a query that nobody timed.

    device = Σ over passes of their times on the roofline (rooflines.py)  +  a constant per launch
    host   = Σ over launches of the time to enqueue one
    time   = the larger of the two

Bytes count each element that a pass touches once, as if the cache kept what its tiles share and
nothing from pass to pass. The counts (counts.py) are compared with the launches that the kernels
make and the operations that PyTorch makes.

No count tells how fast a Triton product is beside cuBLAS's (product_speed.py). Until that was
measured on an architecture, the choice is a rule: cuBLAS multiplies many rows with W, and one
launch does all for few. Where cuBLAS may not, the fastest tiles multiply: with one e for all, those
that shared memory and L2 stretch least.
"""

from __future__ import annotations

import torch

from . import counts, product_speed
from .plans import AUGMENTED, FUSED, HYBRID, Plan, Query, candidates
from .rooflines import roofline_of

# Rows up to which an operation is one launch that reads W once, decoding it if it is NF4.
FEW_ROWS = 64
MOST_TIMED = 3
# From one kernel of a stream to the next, if the host keeps up.
LAUNCH_SECONDS = 2e-6
# Host time to enqueue a kernel, timed on a CPU without a device (python -m bench.host): a compiled
# kernel whose launch is planned, and a call of PyTorch.
TRITON_HOST_SECONDS, ATEN_HOST_SECONDS = 8e-6, 5e-6
# IEEE float32 tiles are small (launch_policy.py): their operands come from shared memory twice as
# often as those of a tile that fills the registers.
_IEEE_SHARE = 0.5
# Decoding takes nearly all issue slots of a K-loop: 470 to 490 of the 512 cycles in which two CTAs
# multiply, by count.
_DECODING_SHARE = 0.5


def pick(q: Query, arch: int | None) -> Plan:
    """The plan without a clock: by the rule of this module, or the fastest by the model where e is
    measured, and of the fused ones where cuBLAS may not be used."""
    if q.M <= FEW_ROWS or (arch is None and not q.cublas):
        return FUSED
    if not q.cublas:
        # Where an NF4 weight is decoded is launch_policy.py's to decide.
        first, *others = candidates(q, arch)
        tiles = [first, *(plan for plan in others if plan.gemm is not None)]
        fastest = min(tiles, key=lambda plan: seconds(plan, q, arch))
        return FUSED if fastest == first else fastest
    if product_speed.is_measured(arch):
        return min(candidates(q, arch), key=lambda plan: seconds(plan, q, arch))
    return AUGMENTED if q.can_augment else HYBRID


def shortlist(q: Query, arch: int | None) -> tuple[Plan, ...]:
    """The plans that are worth timing, at most MOST_TIMED: what is picked without a clock, then the
    modelled fastest of the others, one of the other side (Triton or cuBLAS) among them."""
    first = pick(q, arch)
    if q.M <= FEW_ROWS:
        return (first,)
    plans = candidates(q, arch)
    # FUSED is what launch_policy.py decides, and so is the first of them.
    others = [plan for plan in plans if plan != (plans[0] if first == FUSED else first)]
    others.sort(key=lambda plan: seconds(plan, q, arch))
    chosen = others[: MOST_TIMED - 1]
    opposite = [plan for plan in others if (plan.route == "fused") != (first.route == "fused")]
    if opposite and opposite[0] not in chosen:
        chosen[-1] = opposite[0]
    return (first, *chosen)


def seconds(plan: Plan, q: Query, arch: int | None, e: float | None = None) -> float:
    """Modelled time of a plan; `e` in place of the one that is known."""
    works = counts.works(plan, q, arch)
    roofline = roofline_of(arch)
    at = roofline.seconds
    if q.dtype == torch.float32:
        at = roofline.tf32_seconds if q.tf32 else roofline.float32_seconds
    device = sum(
        at(work, _e_of(work, q, arch, e)) + work.launches * LAUNCH_SECONDS for work in works
    )
    return max(device, host_seconds(works))


def host_seconds(works: list[counts.Work]) -> float:
    """Time in which the host enqueues the launches."""
    return sum(
        work.launches * (ATEN_HOST_SECONDS if work.is_aten else TRITON_HOST_SECONDS)
        for work in works
    )


def _e_of(work: counts.Work, q: Query, arch: int | None, e: float | None) -> float:
    if work.tile is None:
        return 1.0
    if q.dtype == torch.float32 and not q.tf32:
        return _IEEE_SHARE
    if e is None:
        direction = "forward" if q.is_forward else "dX"
        e = product_speed.e_of(work.tile, arch, direction, q.M, q.K, q.N[0])
    return e * _DECODING_SHARE if work.decodes else e
