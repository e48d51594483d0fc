"""A plain layer of few rows on a CPU, in as few aten calls as there can be.

    forward     S = s · drop(x) Aᵀ      y = x Wᵀ + S Bᵀ + bias
    backward    dS = s · dY B      dB = dYᵀ S      dA = dSᵀ drop(x)      dX = dY W + drop'(dS A)

A product of few rows takes as long as a call from Python, so what other layers need has no place
here. The scaling, with that of dropout, is part of S and dS, the smallest matrices; S is saved with
it. Saved are also drop(x) and its mask, if there is dropout: stock PEFT saves as much.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..factors import Constants, Factors
from ..nf4 import NF4Weight
from .torch_dropout import dropout_mask, fresh_mask, keep_scale
from .torch_products import add_product, linear, scaled_product, working_dtype

# Beyond them, layers that read the same x are faster together.
FEW_ROWS = 64
# Up to so many rows, bfloat16 products with A and B take oneDNN's start, which is longer than
# the same products in float32 and the conversions.
_NARROW_ROWS = 32
# For autograd, so that callers may write to y; without a frame of Python.
_not_a_view = torch.ops.aten._unsafe_view.default._op
_ADAPTER_DTYPES = frozenset((torch.float32, torch.bfloat16))


class FewSaved(NamedTuple):
    """What the required gradients read: x, or drop(x) without its scale [M, K] · s · S [M, R] · the
    mask as bytes [M, K] · W, A and B."""

    x: Tensor | None
    S: Tensor | None
    mask: Tensor | None
    W: Tensor | None
    A: Tensor | None
    B: Tensor | None


def covers(x: Tensor, f: Factors) -> bool:
    """Whether a layer that reads x, on a CPU, is computed here."""
    weight, bias, A, B, b, d, g, constants = f
    dtype = x.dtype
    return (
        0 < x.numel() <= FEW_ROWS * x.shape[-1]
        and A is not None
        and B is not None
        and b is d is g is None
        and not isinstance(weight, NF4Weight)
        and weight.dtype is dtype
        and not weight.requires_grad
        and (bias is None or (bias.dtype is dtype and not bias.requires_grad))
        and (dtype is torch.float32 or (dtype is torch.bfloat16 and working_dtype(x) is dtype))
        and A.dtype is B.dtype
        and A.dtype in _ADAPTER_DTYPES
        and constants.rank_spans is None
        and type(constants.scaling) is float
    )


def output(
    x: Tensor, f: Factors, seed: int | Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, FewSaved]:
    """y, and what is saved for the gradients of x, A and B that `needs` names. `seed` is that of
    dropout's mask, which is drawn without one from torch's generator."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return output(x, f, seed, needs)
    W, bias, A, B, *_, (scaling, p, _, _) = f
    assert A is not None and B is not None and isinstance(W, Tensor)
    needs_x, needs_A, needs_B = needs
    shape, dtype, mask = x.shape, x.dtype, None
    rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    M, K = rows.shape
    # A Tensor.to that has nothing to do takes the time of a small product.
    narrow = torch.float32 if M <= _NARROW_ROWS else dtype
    read = rows if dtype is narrow else rows.to(narrow)
    a = A if A.dtype is narrow else A.to(narrow)
    b = B if B.dtype is narrow else B.to(narrow)
    if p > 0.0:
        drawn = fresh_mask(M, K, p) if seed is None else dropout_mask(seed, M, K, p, x.device)
        mask = drawn.view(torch.uint8)
        read, scaling = read * mask, scaling * keep_scale(p)
    S = _scaled(read, a.t(), scaling)
    if dtype is torch.float32:
        y = linear(rows, W, bias).addmm_(S, b.t())
    else:
        # The product with W last: its sum is rounded once.
        y = torch.mm(S, b.t()) if bias is None else torch.addmm(bias.to(narrow), S, b.t())
        y = (y if dtype is narrow else y.to(dtype)).addmm_(rows, W.t())
    if len(shape) != 2:
        y = _not_a_view(y, (*shape[:-1], y.shape[1]))
    return y, FewSaved(
        (x if mask is None else read) if needs_A else None,
        S if needs_B else None,
        mask if needs_x else None,
        W if needs_x else None,
        A if needs_x else None,
        B if needs_x or needs_A else None,
    )


def gradients(
    dY: Tensor, saved: FewSaved, constants: Constants, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of x, A and B for which there is what they read; of A and B in `dtype`, theirs."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return gradients(dY, saved, constants, dtype)
    x, S, mask, W, A, B = saved
    dX = dA = dB = None
    shape = dY.shape
    rows = dY if len(shape) == 2 else dY.reshape(-1, shape[-1])
    narrow = torch.float32 if rows.shape[0] <= _NARROW_ROWS else rows.dtype
    wide = rows if rows.dtype is narrow else rows.to(narrow)
    if S is not None:
        dB = torch.mm(wide.t(), S)
        dB = dB if dtype is narrow else dB.to(dtype)
    if B is not None:
        scaling, p, _, _ = constants
        scaling = scaling if p == 0.0 else scaling * keep_scale(p)
        dS = _scaled(wide, B if B.dtype is narrow else B.to(narrow), scaling)
        if x is not None:
            x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
            dA = torch.mm(dS.t(), x if x.dtype is narrow else x.to(narrow))
            dA = dA if dtype is narrow else dA.to(dtype)
        if W is not None and A is not None:
            dX = torch.mm(dS, A if A.dtype is narrow else A.to(narrow))
            dX = dX if mask is None else dX.mul_(mask)
            dX = add_product(dX if rows.dtype is narrow else dX.to(rows.dtype), rows, W)
            dX = dX if len(shape) == 2 else dX.view(*shape[:-1], dX.shape[1])
    return dX, dA, dB


def _scaled(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """s · (a b), rounded once to 16 bits."""
    if a.dtype is torch.float32:
        return torch.mm(a, b).mul_(scaling)
    return scaled_product(a, b, scaling)
