"""The context of a step's units: the device, and whether this is a rehearsal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lora_fast.backends.choice import BackendName

from .steps import STUB_ARCH


@dataclass(frozen=True)
class Day:
    """``seconds``: time that one comparison may take; ``rounds``: its least and most rounds.

    ``arch``: the compute capability as one number, 90 for 9.0; ``fused``: the backend whose only
    route is the fused kernels, where ``auto`` may prefer cuBLAS; ``computes``: kernels are run, not
    only compiled.
    """

    device: torch.device
    arch: int
    rehearsal: bool
    fused: BackendName = "triton"
    seconds: float = 3.0
    rounds: tuple[int, int] = (11, 101)
    warm_up_calls: int = 3
    computes: bool = True


@contextlib.contextmanager
def day(*, rehearse: bool) -> Iterator[Day]:
    """The GPU, or in a rehearsal the CPU with stand-ins for torch.cuda.

    A rehearsal runs the kernels in Triton's interpreter (TRITON_INTERPRET=1, which the command
    sets), or compiles them for the architecture in the variable STUB_ARCH and runs none; otherwise
    the torch backend replaces them.
    """
    if not rehearse:
        major, minor = torch.cuda.get_device_capability(0)
        yield Day(torch.device("cuda", 0), 10 * major + minor, rehearsal=False)
        return
    import triton

    import lora_fast
    from bench.instruments import stub_driver

    from . import stand_in

    interprets, stub_arch = triton.knobs.runtime.interpret, os.environ.get(STUB_ARCH)
    fused: BackendName = "triton" if interprets or stub_arch else "torch"
    with contextlib.ExitStack() as stack:
        stack.enter_context(stand_in.cuda())
        stack.enter_context(lora_fast.set_backend(fused))
        if stub_arch:
            stack.enter_context(stub_driver.recording(int(stub_arch)))
        elif interprets:
            from bench.instruments import triton_interpreter

            triton_interpreter.install()
        yield Day(
            torch.device("cpu"), int(stub_arch or 90), rehearsal=True, fused=fused,
            seconds=0.0, rounds=(2, 2), warm_up_calls=0, computes=not stub_arch,
        )  # fmt: skip
