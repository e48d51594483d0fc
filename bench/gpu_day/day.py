"""What the units of a step need to know: the device, and whether this is a rehearsal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lora_fast.backend import Backend


@dataclass(frozen=True)
class Day:
    """``seconds``: time that one comparison may take; ``rounds``: its least and most rounds.

    ``arch``: the compute capability as one number, 90 for 9.0; ``fused``: the backend whose only
    route is the fused kernels, where ``auto`` may prefer cuBLAS.
    """

    device: torch.device
    arch: int
    rehearsal: bool
    fused: Backend = "triton"
    seconds: float = 3.0
    rounds: tuple[int, int] = (11, 101)
    warm_up_calls: int = 3


@contextlib.contextmanager
def day(*, rehearse: bool) -> Iterator[Day]:
    """The GPU, or in a rehearsal the CPU with stand-ins for torch.cuda.

    A rehearsal runs the kernels where Triton interprets (TRITON_INTERPRET=1), as the command makes
    it do; elsewhere the torch backend stands in for them.
    """
    if not rehearse:
        major, minor = torch.cuda.get_device_capability(0)
        yield Day(torch.device("cuda", 0), 10 * major + minor, rehearsal=False)
        return
    import triton

    import lora_fast

    from . import stand_in

    interprets = triton.knobs.runtime.interpret
    with stand_in.cuda(), lora_fast.set_backend("triton" if interprets else "torch"):
        if interprets:
            from tests import triton_interpreter

            triton_interpreter.install()
        yield Day(
            torch.device("cpu"), 90, rehearsal=True, fused="triton" if interprets else "torch",
            seconds=0.0, rounds=(2, 2), warm_up_calls=0,
        )  # fmt: skip
