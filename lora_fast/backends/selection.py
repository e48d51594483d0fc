"""The backend of a call."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..experts.operands import Projection
from . import torch_experts, torch_grouped
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


def experts_for(x: Tensor, *projections: Projection) -> Any:
    """The module that computes experts of x with the functions of :mod:`torch_experts`, by the
    choice in force.

    Raises ValueError as :func:`backend_for`.
    """
    name = get_backend()
    if name != "torch" and uses_triton(x.device, name) and x.dtype != torch.float64:
        return _triton_experts(name)
    return torch_grouped if torch_grouped.takes(x, *projections) else torch_experts


@functools.cache
def _triton_experts(name: BackendName) -> Any:
    check_driver(name)
    from . import triton_expert_plans

    return triton_expert_plans


@functools.cache
def _triton(name: BackendName) -> Backend:
    """Imported on first use, since importing Triton is slow; checked once."""
    check_driver(name)
    from .triton_plans import PlannedTritonBackend

    return PlannedTritonBackend(cublas=name == "auto")
