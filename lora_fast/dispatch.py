"""The one place where an operation meets a backend.

Modules above know neither Triton nor aten; the backends below know neither autograd nor modules.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from . import torch_ops
from .backend import uses_triton
from .factors import Factors, Gradients, Needs


def forward(x: Tensor, f: Factors, needs: Needs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [M, N], S [M, R] and V [M, N] (None unless the backward pass needs them) for x [M, K]."""
    return _backend(x).forward(x, f, needs)


def backward(
    dY: Tensor, x: Tensor | None, S: Tensor | None, V: Tensor | None, f: Factors, needs: Needs
) -> Gradients:
    """Every gradient that `needs` names, from dY [M, N] and what the forward pass saved."""
    return _backend(dY).backward(dY, x, S, V, f, needs)


def dropout_mask(seed: int, M: int, K: int, p: float, device: torch.device) -> Tensor:
    """The keep-mask [M, K] that the backend in charge of `device` uses for `seed`."""
    return _select(device).dropout_mask(seed, M, K, p, device)


def _backend(x: Tensor) -> ModuleType:
    return _select(x.device)


def _select(device: torch.device) -> ModuleType:
    if uses_triton(device):
        return importlib.import_module("lora_fast.triton_ops")
    return torch_ops
