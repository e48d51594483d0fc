"""The one place where an operation meets a backend.

Modules above know neither Triton nor aten; the backends below know neither autograd nor modules.
What has a forward and a backward pass is told its backend, so that both use the same, on whatever
thread autograd runs the second.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import torch_ops
from ..backends.choice import Backend, check_driver, get_backend, uses_triton
from ..factors import Factors, Gradients, Needs, Saved
from ..nf4 import NF4Weight


def forward(x: Tensor, f: Factors, needs: Needs, backend: Backend) -> tuple[Tensor, Saved]:
    """y [M, N] for x [M, K], and what the backward pass needs."""
    return _select(x.device, backend).forward(x, f, needs)


def backward(
    dY: Tensor, x: Tensor | None, saved: Saved, f: Factors, needs: Needs, backend: Backend
) -> Gradients:
    """Every gradient that `needs` names, from dY [M, N] and what the forward pass saved."""
    return _select(dY.device, backend).backward(dY, x, saved, f, needs)


def forward_group(
    x: Tensor, fs: Sequence[Factors], backend: Backend
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """y [M, N_i] of several plain LoRA layers that read the same x [M, K], S [M, Σ R_i], and
    dropout's mask, which they share, from a backend that keeps it."""
    return _select(x.device, backend).forward_group(x, fs)


def backward_group(
    dYs: Sequence[Tensor],
    x: Tensor | None,
    S: Tensor,
    mask: Tensor | None,
    fs: Sequence[Factors],
    needs: list[Needs],
    backend: Backend,
) -> list[Gradients]:
    """Every wanted gradient of every layer of a group; that of x, summed, is with the first."""
    return _select(S.device, backend).backward_group(dYs, x, S, mask, fs, needs)


def dropout_mask(seed: int, M: int, K: int, p: float, device: torch.device) -> Tensor:
    """The keep-mask [M, K] that the backend in charge of `device` uses for `seed`."""
    return _select(device, get_backend()).dropout_mask(seed, M, K, p, device)


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
    ops = torch_ops if W.dtype == torch.float64 else _select(W.device, get_backend())
    ops.update_weight(W, out, A, B, b, d, g, scaling)


def row_norms(
    weight: Tensor | NF4Weight,
    A: Tensor,
    B: Tensor,
    scaling: float,
    backend: Backend | None = None,
) -> Tensor:
    """‖W_i + s (B A)_i‖₂ [N] in float32, by the backend that is chosen unless one is given."""
    device = weight.device
    # In float32 under autocast, too.
    with torch.autocast(device.type, enabled=False):
        return _select(device, backend or get_backend()).row_norms(weight, A, B, scaling)


def _select(device: torch.device, backend: Backend) -> Any:
    return _routes(backend) if uses_triton(device, backend) else torch_ops


@functools.cache
def _routes(backend: Backend) -> Any:
    """Imported when it is wanted, since Triton's own import takes its time; checked once."""
    check_driver(backend)
    return importlib.import_module("lora_fast.backends.routes").Routes(cublas=backend == "auto")
