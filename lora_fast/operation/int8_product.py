"""The product with a weight in 8 bits, decoded for the time of the product.

    y = x Wᵀ + bias          W[n, k] = CB[n, k] · SCB[n] / 127

CB [N, K] is int8 and SCB [N] the float32 absmax of each row, as bitsandbytes stores them; W is a
float32 product, rounded once. Unlike bitsandbytes' own product it rounds nothing in x. No W is
saved: backward decodes it again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends.torch_layer import rows_of, without_autocast
from ..backends.torch_products import add_product, linear, wide_dtype, working_dtype
from .autograd import is_recording
from .second_derivatives import differentiable_once

# Elements decoded at a time on a CPU, few enough to stay in the cache.
_BLOCK_ELEMENTS = 1 << 18


def int8_product(x: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., N] of x [..., K] in the dtype of x, differentiable in x and bias."""
    if is_recording():
        product: Tensor = _Product.apply(x, CB, SCB, bias)
        return product
    return _forward(x, CB, SCB, bias)


def decode(CB: Tensor, SCB: Tensor, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`."""
    W = torch.empty(CB.shape, dtype=dtype, device=CB.device)
    scales = SCB.float().mul(1.0 / 127.0).unsqueeze(1)
    N, K = CB.shape
    step = max(1, _BLOCK_ELEMENTS // max(1, K)) if CB.device.type == "cpu" else max(1, N)
    for start in range(0, N, step):
        rows = slice(start, start + step)
        torch.mul(CB[rows], scales[rows], out=W[rows])
    return W


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(CB, SCB)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward(x, CB, SCB, bias)

    @staticmethod
    @partial(differentiable_once, x=None)
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        CB, SCB = ctx.saved_tensors
        dX = dbias = None
        with without_autocast(dY):
            rows = rows_of(dY, working_dtype(dY))
            if ctx.needs_input_grad[0]:
                dX = add_product(None, rows, decode(CB, SCB, rows.dtype)).to(dY.dtype)
                dX = dX.view(*dY.shape[:-1], CB.shape[1])
            if ctx.needs_input_grad[3]:
                dbias = rows.sum(0, dtype=wide_dtype(rows.dtype)).to(ctx.bias_dtype)
        return dX, None, None, dbias


def _forward(x: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None) -> Tensor:
    with without_autocast(x):
        rows = rows_of(x, working_dtype(x))
        W = decode(CB, SCB, rows.dtype)
        y = linear(rows, W, None if bias is None else bias.to(rows.dtype))
        return y.to(x.dtype).view(*x.shape[:-1], CB.shape[0])
