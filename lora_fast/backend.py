"""Which backend computes: ``auto``, ``triton`` or ``torch``.

``auto`` takes Triton for tensors on an NVIDIA GPU of compute capability 8.0 or more, else torch.
``triton`` launches on whatever device the tensors are on and asks no question about CUDA; where
Triton has no driver or miscompiles the kernels, the first operation raises ValueError. ``torch``
is the same autograd.Function on aten and bitsandbytes calls. The environment variable
``LORA_FAST_BACKEND`` sets the choice at start-up, :func:`set_backend` later.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
from typing import Literal, cast, get_args

import torch

Backend = Literal["auto", "triton", "torch"]


def _checked(name: str, origin: str) -> Backend:
    if name not in get_args(Backend):
        raise ValueError(f"{origin} must be one of {', '.join(get_args(Backend))}, got {name!r}")
    return cast(Backend, name)


_choice: Backend = _checked(os.environ.get("LORA_FAST_BACKEND", "auto"), "LORA_FAST_BACKEND")


class set_backend:
    """Choose the backend: ``set_backend("triton")``, or for a block ``with set_backend("torch"):``.

    Takes effect at once. Raises ValueError for a name that is not auto, triton or torch.
    """

    def __init__(self, name: Backend) -> None:
        global _choice
        self._previous = _choice
        _choice = _checked(name, "name")

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        global _choice
        _choice = self._previous


def get_backend() -> Backend:
    """The current choice, not yet resolved for a device."""
    return _choice


def uses_triton(device: torch.device) -> bool:
    """Whether operations on tensors of `device` go to the Triton kernels."""
    if _choice == "auto":
        return device.type == "cuda" and _kernels_run_on(device.index)
    return _choice == "triton"


def check_driver() -> None:
    """Check that Triton can launch kernels on this machine, and rightly, or interprets them.

    Raises ValueError, which says what to choose instead, if it cannot.
    """
    try:
        from triton import knobs
        from triton.runtime import driver

        if knobs.runtime.interpret:
            return
        arch = driver.active.get_current_target().arch
    except Exception as error:  # a driver is built when it is first asked for, by a C compiler
        reason = str(error).strip().partition("\n")[0]
        allowed = "torch" if _choice == "auto" else "auto or torch"
        raise ValueError(
            f"LORA_FAST_BACKEND or set_backend must choose {allowed} on this machine, got "
            f"{_choice}: Triton has no driver for it ({reason})"
        ) from error
    if isinstance(arch, int) and is_miscompiled(arch // 10):
        raise ValueError(
            f"LORA_FAST_BACKEND or set_backend must choose torch on this machine, got {_choice}: "
            f"{MISCOMPILED}; pip install 'triton<3.9' where torch allows it"
        )


# Between a load from tensor memory (tcgen05.ld) and tcgen05.wait::ld its registers are undefined.
# Triton 3.9.0 converts and stores the low-rank product in between: seen in its PTX for sm_100.
MISCOMPILED = "Triton 3.9 miscompiles the kernels for compute capability 10"


def is_miscompiled(major: int) -> bool:
    """Whether the installed Triton gets the kernels wrong for a major compute capability."""
    numbers = re.findall(r"\d+", importlib.metadata.version("triton"))
    return major == 10 and [int(number) for number in numbers[:2]] >= [3, 9]


@functools.cache
def _kernels_run_on(index: int | None) -> bool:
    """Whether the kernels were compiled and proven for the GPU `index` (None: the current one)."""
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return False
    capability = torch.cuda.get_device_capability(index)
    return capability >= (8, 0) and not is_miscompiled(capability[0])
