"""The composed route on a Triton device: the aten calls of torch_ops.py, whose products are
cuBLAS's, with the kernels' own dropout mask and NF4 decoding.

What it saves is what the Triton backend saves, so either can take the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..factors import Factors, Gradients, Needs, Saved
from ..kernels.dropout import Dropout
from . import torch_ops, triton_ops


def forward(x: Tensor, f: Factors, needs: Needs) -> tuple[Tensor, Saved]:
    """y [M, N] and, where the backward pass needs them, S and V; x is [M, K]."""
    with torch.cuda.device_of(x):
        y, saved = torch_ops.forward(x, _decoded(_drawn(f), x), needs, mask=_mask(f, x))
    return y, saved._replace(mask=None)


def backward(dY: Tensor, x: Tensor | None, saved: Saved, f: Factors, needs: Needs) -> Gradients:
    """Every wanted gradient for dY [M, N]; x [M, K] and `saved` as either forward left them."""
    with torch.cuda.device_of(dY):
        mask = _mask(f, dY) if needs.saves_mask else None
        f = _decoded(_drawn(f), dY) if needs.x else _drawn(f)
        return torch_ops.backward(dY, x, saved._replace(mask=mask), f, needs)


def forward_group(x: Tensor, fs: Sequence[Factors]) -> tuple[list[Tensor], Tensor, None]:
    """y [M, N_i] of layers that read the same x, and their S [M, Σ R_i] side by side."""
    with torch.cuda.device_of(x):
        dense = [_decoded(_drawn(f), x) for f in fs]
        ys, S, _ = torch_ops.forward_group(x, dense, mask=_mask(fs[0], x))
    return ys, S, None


def backward_group(
    dYs: Sequence[Tensor],
    x: Tensor | None,
    S: Tensor,
    mask: None,
    fs: Sequence[Factors],
    needs: list[Needs],
) -> list[Gradients]:
    """The gradients of every layer of a group; that of x, their sum, is with the first."""
    with torch.cuda.device_of(S):
        keep = _mask(fs[0], S) if any(need.saves_mask for need in needs) else None
        fs = [_drawn(f) for f in fs]
        fs = [_decoded(f, S) if need.x else f for f, need in zip(fs, needs, strict=True)]
        return torch_ops.backward_group(dYs, x, S, keep, fs, needs)


def _decoded(f: Factors, like: Tensor) -> Factors:
    """With W dense, in the dtype of x, decoded in one launch; the same bits as in the kernels."""
    return f._replace(weight=triton_ops.dense(f.weight, like.dtype))


def _drawn(f: Factors) -> Factors:
    """With the p that the kernels' mask has, by which what it keeps is scaled."""
    return f._replace(dropout_p=Dropout(f.dropout_p).drawn)


def _mask(f: Factors, rows: Tensor) -> Tensor | None:
    """Dropout's mask [M, K] as the kernels draw it."""
    if f.dropout_p == 0.0 or not f.has_adapter:
        return None
    M, K = rows.shape[0], f.weight.shape[1]
    return triton_ops.dropout_mask(f.dropout_seed, M, K, f.dropout_p, rows.device)
