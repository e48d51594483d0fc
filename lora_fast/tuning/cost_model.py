"""Modelled times of the two ways to compute an operation: fused and hybrid.

    time = Σ over passes of max(FLOPs / FLOP/s, bytes / bytes/s)  +  a constant for each launch

Bytes count each element that a pass touches once, as if the cache kept what its tiles share and
nothing from pass to pass. The counts of the fused way are compared with the launches that the
kernels make, those of the hybrid way with the operations that PyTorch makes.

Bytes cannot tell whether a Triton product runs as fast as cuBLAS's: that is an unmeasured constant
here (_SHARE_OF_CUBLAS), and LORA_FAST_AUTOTUNE=1 times both instead. bench/instruments/traffic.py
counts bytes from recorded launches; this model needs the query alone.
"""

from __future__ import annotations

import torch

from ..kernels.launch_policy import SMALL_SHARED
from . import counts
from .plans import FUSED, HYBRID, Plan, Query
from .rooflines import ATTAINED_BYTES, ATTAINED_FLOPS, BY_ARCH, Roofline

# From one kernel of a stream to the next, if the host keeps up.
_LAUNCH_SECONDS = 2e-6
# IEEE float32 tiles are small (launch_policy.py): their operands come from shared memory twice as
# often as those of a tile that fills the registers.
_SHARE_OF_CUBLAS = {torch.float32: 0.5}


def pick(q: Query, arch: int | None) -> Plan:
    """The plan with the lower estimate; fused if they tie, or if cuBLAS may not be used."""
    if not q.cublas or seconds(FUSED, q, arch) <= seconds(HYBRID, q, arch):
        return FUSED
    return HYBRID


def seconds(plan: Plan, q: Query, arch: int | None) -> float:
    """Modelled time of FUSED or HYBRID."""
    roofline = roofline_of(arch)
    flops = roofline.float32_flops if q.dtype == torch.float32 else roofline.flops
    flops *= ATTAINED_FLOPS * (1.0 if plan.route != "fused" else _SHARE_OF_CUBLAS.get(q.dtype, 1.0))
    return sum(
        max(work.flops / flops, work.bytes / (roofline.bytes * ATTAINED_BYTES))
        + work.launches * _LAUNCH_SECONDS
        for work in counts.works(plan, q, arch)
    )


def roofline_of(arch: int | None) -> Roofline:
    """That of the architecture, or of the nearest one with a data sheet here."""
    if arch in SMALL_SHARED:
        return BY_ARCH[89]
    older = [known for known in (80, 90, 100) if known <= (arch or 90)]
    return BY_ARCH[older[-1] if older else 80]
