"""The one place where an operation meets a backend.

Modules above know neither Triton nor aten; the backends below know neither autograd nor modules.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import torch_ops
from .backend import check_driver, uses_triton
from .factors import Factors, Gradients, Needs, Saved
from .nf4 import NF4Weight


def forward(x: Tensor, f: Factors, needs: Needs) -> tuple[Tensor, Saved]:
    """y [M, N] for x [M, K], and what the backward pass needs."""
    return _select(x.device).forward(x, f, needs)


def backward(dY: Tensor, x: Tensor | None, saved: Saved, f: Factors, needs: Needs) -> Gradients:
    """Every gradient that `needs` names, from dY [M, N] and what the forward pass saved."""
    return _select(dY.device).backward(dY, x, saved, f, needs)


def forward_group(x: Tensor, fs: Sequence[Factors]) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """y [M, N_i] of several plain LoRA layers that read the same x [M, K], S [M, Σ R_i], and
    dropout's mask, which they share, from a backend that keeps it."""
    return _select(x.device).forward_group(x, fs)


def backward_group(
    dYs: Sequence[Tensor],
    x: Tensor | None,
    S: Tensor,
    mask: Tensor | None,
    fs: Sequence[Factors],
    needs: list[Needs],
) -> list[Gradients]:
    """Every wanted gradient of every layer of a group; that of x, summed, is with the first."""
    return _select(S.device).backward_group(dYs, x, S, mask, fs, needs)


def dropout_mask(seed: int, M: int, K: int, p: float, device: torch.device) -> Tensor:
    """The keep-mask [M, K] that the backend in charge of `device` uses for `seed`."""
    return _select(device).dropout_mask(seed, M, K, p, device)


@torch.no_grad()
def update_weight(
    W: Tensor,
    out: Tensor,
    *,
    A: Tensor | None = None,
    B: Tensor | None = None,
    b: Tensor | None = None,
    d: Tensor | None = None,
    g: Tensor | None = None,
    scaling: float = 1.0,
) -> None:
    """out ← round(g ⊙ (W + s · (b ⊙ (B d)) A)) for dense W and out [N, K]; out may be W itself.

    Products and sums in float32, in float64 where W is float64; one rounding to out's dtype.
    """
    backend = torch_ops if W.dtype == torch.float64 else _select(W.device)
    backend.update_weight(W, out, A, B, b, d, g, scaling)


def row_norms(
    weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float, state: Any
) -> tuple[Tensor, Any]:
    """‖W_i + s (B A)_i‖₂ [N] in float32, and the state that makes the next call cheaper.

    `state` is what the previous call for the same W returned, or None.
    """
    device = weight.device
    # In float32 under autocast, too: the norms are kept for calls outside it.
    with torch.autocast(device.type, enabled=False):
        return _select(device).row_norms(weight, A, B, scaling, state)


def _select(device: torch.device) -> ModuleType:
    return _routes() if uses_triton(device) else torch_ops


@functools.cache
def _routes() -> ModuleType:
    """Imported when it is wanted, since Triton's own import takes its time; checked once."""
    check_driver()
    return importlib.import_module("lora_fast.routes")
