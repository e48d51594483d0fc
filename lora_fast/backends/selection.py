"""The backend of a call."""

from __future__ import annotations

import functools

import torch

from .choice import BackendName, check_driver, get_backend, uses_triton
from .protocol import Backend
from .torch_ops import TORCH


def backend_for(device: torch.device, name: BackendName | None = None) -> Backend:
    """The backend for tensors of `device`, by the choice in force unless one is given.

    Raises ValueError if it is Triton's and Triton cannot launch kernels, or miscompiles them.
    """
    name = name or get_backend()
    if name == "torch" or (name == "auto" and not uses_triton(device, name)):
        return TORCH
    return _triton(name)


@functools.cache
def _triton(name: BackendName) -> Backend:
    """Imported on first use, since importing Triton is slow; checked once."""
    check_driver(name)
    from .triton_plans import PlannedTritonBackend

    return PlannedTritonBackend(cublas=name == "auto")
