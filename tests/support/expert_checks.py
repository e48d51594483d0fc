"""Blocks of experts: operands, results in every dtype, and their check by the rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.instruments.accuracy import assert_all_accurate, assert_as_close, orders
from lora_fast import reference
from lora_fast.backends.torch_gates import GluForm
from lora_fast.experts.nf4_experts import NF4Experts
from lora_fast.experts.operands import Projection
from lora_fast.functional import experts_block

# Not powers of two; experts 0, 1, 2 have rows, 3 has none, 4 has one.
E, H, INNER, R = 5, 13, 9, 3
TRAINED = ("x", "w", "first.bias", "first.A", "first.B", "second.bias", "second.A", "second.B")


# No row of the 16-bit tests is within a rounding of its limit, where the slope of one side is as
# right as that of the other.
CLAMPED = GluForm("silu", interleaved=True, limit=1.66, alpha=1.7, shift=1.0)


def _clamped(rows: Tensor, limit: float = 0.5) -> Tensor:
    """As in gpt_oss: interleaved, clamped, with a gate of its own."""
    gate, up = rows[..., ::2].clamp(max=limit), rows[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(gate * 1.7)


def _silu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _interleaved_gelu(rows: Tensor) -> Tensor:
    return torch.nn.functional.gelu(rows[..., ::2], approximate="tanh") * rows[..., 1::2]


def _relu2(rows: Tensor) -> Tensor:
    return torch.nn.functional.relu(rows).square()


# (arguments of experts_block, the same gate for the reference, rows of the first projection)
GATES: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor], int]] = {
    "silu": ({}, _silu, 2 * INNER),
    "own": ({"activation": _clamped}, _clamped, 2 * INNER),
    "interleaved": (
        {"activation": "gelu_tanh", "interleaved": True}, _interleaved_gelu, 2 * INNER
    ),
    "clamped": (
        {"activation": CLAMPED}, functools.partial(_clamped, limit=CLAMPED.limit), 2 * INNER
    ),
    "ungated": ({"activation": "relu2", "gated": False}, _relu2, INNER),
}  # fmt: skip


def operands(
    P: int,
    tokens: int,
    k: int,
    *,
    transposed: bool,
    bias: bool,
    r: int = R,
    hidden: int = H,
    inner: int = INNER,
) -> Any:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    first = {"weight": draw(E, hidden, P).transpose(1, 2) if transposed else draw(E, P, hidden)}
    second = {
        "weight": draw(E, inner, hidden).transpose(1, 2) if transposed else draw(E, hidden, inner)
    }
    for factors, N, K in ((first, P, hidden), (second, hidden, inner)):
        factors["weight"] = factors["weight"] / K**0.5
        # B as PEFT stores it: [N, R, E], the experts fastest.
        factors |= {"A": draw(E, r, K) / K**0.5, "B": draw(N, r, E).permute(2, 0, 1)}
        factors["bias"] = draw(E, N) if bias else None
    # Experts 0, 1, 2 and, of one row alone, 4.
    choices = [torch.randperm(3, generator=generator)[:k] for _ in range(tokens)]
    index = torch.stack(choices) if tokens else torch.zeros(0, k, dtype=torch.int64)
    if tokens > 1:
        index[0, 0] = 4
    return draw(tokens, hidden), index, draw(tokens, k), first, second


def run(
    call: Callable[..., Tensor],
    values: Any,
    dtype: torch.dtype,
    trains: tuple[str, ...] = TRAINED,
) -> dict[str, Any]:
    """The output and all gradients of a block, in `dtype`; weights, too, are rounded to it."""
    x, index, w, first, second = values
    leaves = {"x": x, "w": w}
    for name, factors in (("first", first), ("second", second)):
        leaves |= {f"{name}.{key}": t for key, t in factors.items()}
    leaves = {
        key: t if not isinstance(t, Tensor) else t.detach().to(dtype).requires_grad_(key in trains)
        for key, t in leaves.items()
    }
    parts = [
        {key: leaves[f"{name}.{key}"] for key in ("weight", "bias", "A", "B")} | {"scaling": 0.7}
        for name in ("first", "second")
    ]
    y = call(leaves["x"], index, leaves["w"], *parts)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
    y.backward(direction.to(y.device, dtype))
    grads = {key: t.grad for key, t in leaves.items() if isinstance(t, Tensor) and t.requires_grad}
    return {"y": y.detach(), **grads}


def check(values: Any, gate: str, dtype: torch.dtype = torch.float32) -> None:
    """The accuracy rule in float32. In 16 bits results come through two rounded projections and a
    gate, as through a small model: no further from float64 than twice plain PyTorch."""
    plain = GATES[gate][1]

    def specified(x: Tensor, index: Tensor, w: Tensor, *both: Any) -> Tensor:
        return reference.experts_block(x, index, w, *(_dense(f, x.dtype) for f in both), plain)

    rounded = [_rounded(v, dtype) for v in values]
    actual, ref64 = run(fused(gate), rounded, dtype), run(specified, rounded, torch.float64)
    eager = orders(lambda: run(specified, rounded, dtype))
    if dtype is torch.float32:
        assert_all_accurate(actual, ref64, eager)
        return
    for key, expected in ref64.items():
        if expected is not None:
            assert_as_close(actual[key], expected, eager[key], name=key)


def fused(gate: str) -> Callable[..., Tensor]:
    """experts_block with that gate."""

    def call(x: Tensor, index: Tensor, w: Tensor, first: Any, second: Any) -> Tensor:
        projections = Projection(**first), Projection(**second)
        return experts_block(x, index, w, *projections, **GATES[gate][0])

    return call


def _dense(factors: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    weight = factors["weight"]
    if isinstance(weight, NF4Experts):
        weight = weight.dequantize().to(dtype)
    return {**factors, "weight": weight}


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(t, dtype) for key, t in value.items()}
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.to(dtype).float()


def block(x: Tensor, index: Tensor, w: Tensor, first: Any, second: Any) -> Tensor:
    return experts_block(x, index, w, Projection(**first), Projection(**second))
