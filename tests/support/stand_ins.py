"""Stand-ins for base layers whose packages need a GPU: their attributes, and what their forward
does to x and y, in a few lines of PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Packed(nn.Module):
    """No weight: rows of int8 with a scale each, decoded in forward.

    A class that is derived from it says how an x comes in, and how a y goes out.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        W = linear.weight.detach()
        scales = W.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", (W / scales).round().to(torch.int8))
        self.bias = linear.bias

    def decoded(self, dtype: torch.dtype) -> Tensor:
        W: Tensor = self.qweight.to(dtype) * self.scales.to(dtype)
        return W

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.decoded(x.dtype), bias)


class _SavesItsOutput(torch.autograd.Function):
    """y = x Wᵀ + bias, whose backward pass needs y as forward left it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        y = nn.functional.linear(x, W, bias)
        ctx.save_for_backward(W, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        W, y = ctx.saved_tensors  # raises if y was changed in place
        assert y.shape == dY.shape
        return dY @ W, None, None


class TritonV2QuantLinear(Packed):
    """GPTQ: computes rows in float32, and returns a view of them in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        y = rows @ self.decoded(torch.float32).T
        y = y if self.bias is None else y + self.bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


class WQLinear_GEMM(Packed):
    """AWQ: an autograd.Function of its own around the decoded weight."""

    w_bit = 8

    def forward(self, x: Tensor) -> Tensor:
        y = _SavesItsOutput.apply(x, self.decoded(x.dtype), None)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class QuantizedLinear(Packed):
    """AQLM: codes and codebooks."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.register_buffer("codes", self.qweight.clone())
        self.register_buffer("codebooks", torch.arange(-128, 128))

    def decoded(self, dtype: torch.dtype) -> Tensor:
        W: Tensor = self.codebooks[self.codes.long() + 128].to(dtype) * self.scales.to(dtype)
        return W


class EetqLinear(Packed):
    """EETQ: the weight is int8 [K, N], and the output that of a Function which saves it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.register_buffer("weight", self.qweight.T.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = _SavesItsOutput.apply(x, self.decoded(x.dtype), bias)
        return y


class PatchedLinear(Packed):
    """INC: x is rounded to 8 bits by a fixed scale before the product."""

    def forward(self, x: Tensor) -> Tensor:
        scale, given = 8.0 / 127, x.detach()
        return super().forward(x + ((given / scale).round().clamp(-127, 127) * scale - given))


class TransformerEngineLinear(Packed):
    """Transformer Engine: takes more arguments, works on rows and returns a view of them."""

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        rows = inp.view(-1, inp.shape[-1])
        bias = None if self.bias is None else self.bias.to(inp.dtype)
        y = _SavesItsOutput.apply(rows, self.decoded(inp.dtype), bias)
        return y.view(*inp.shape[:-1], self.out_features)


class FP8Linear(nn.Linear):
    """A subclass of nn.Linear with rows of float8 and a scale each; x is rounded, too."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        W = linear.weight.detach().float()
        scale = W.abs().amax(1, keepdim=True) / 448
        self.register_buffer("weight_scale_inv", scale)
        self.weight = nn.Parameter((W / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        W = (self.weight.float() * self.weight_scale_inv).to(x.dtype)
        rounded = x + (x.detach().to(torch.float8_e4m3fn).to(x.dtype) - x.detach())
        return nn.functional.linear(rounded, W, self.bias.to(x.dtype))
