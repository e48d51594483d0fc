"""Layers that read the same x: built, computed in every way, and checked by the rule."""

from __future__ import annotations

import torch
from equation import lay_out

from bench.instruments.accuracy import assert_all_accurate, orders
from lora_fast import NF4Weight, reference
from lora_fast.backends.selection import backend_for
from lora_fast.functional import Member, adapted_linears

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

SIZES = ((72, 5), (40, 16), (136, 8))


def make(
    dtype, adapter, nf4, M=37, K=64, device="cpu", trains=("x", "A", "B"), dY_layout="contiguous",
    A_layout="contiguous", R=None,
):  # fmt: skip
    """x, members and their dY; adapter, nf4 and A_layout are those of all members, or one for each.
    With a rank R all have it, and a bias."""
    torch.manual_seed(0)
    adapters, packed, layouts = _each(adapter), _each(nf4), _each(A_layout)

    def randn(*shape, of=dtype):
        return torch.randn(shape).to(of).to(device)

    x = randn(M, K).requires_grad_("x" in trains)
    members = []
    for i, (N, own) in enumerate(SIZES):
        weight, rank = randn(N, K), R or own
        bias = randn(N).requires_grad_("bias" in trains) if R or i != 1 else None
        A, B = randn(rank, K, of=adapters[i]), randn(N, rank, of=adapters[i])
        A = lay_out(A, layouts[i])
        for name, factor in (("A", A), ("B", B)):
            factor.requires_grad_(name in trains)
        weight = NF4Weight.from_dense(weight) if packed[i] else weight
        members.append(Member(weight, bias, A, B, 0.5 + i))
    return x, members, [lay_out(randn(M, N), dY_layout) for N, _ in SIZES]


def _each(value):
    return value if isinstance(value, tuple) else (value,) * len(SIZES)


def _with_dropout(x, members):
    return adapted_linears(x, members, dropout_p=0.3, dropout_seed=11)


def results_of(call, x, members, dYs, convert):
    """Outputs and gradients; a dY that is None belongs to an output that leads to no loss."""
    x = convert(x).detach().requires_grad_(x.requires_grad)
    leaves = [
        tuple(
            None if t is None else convert(t).detach().requires_grad_(t.requires_grad)
            for t in (member.bias, member.A, member.B)
        )
        for member in members
    ]
    ys = call(
        x, [m._replace(bias=b, A=A, B=B) for m, (b, A, B) in zip(members, leaves, strict=True)]
    )
    led = [(y, convert(dY).to(y.dtype)) for dY, y in zip(dYs, ys, strict=True) if dY is not None]
    torch.autograd.backward(*zip(*led, strict=True))
    found = {"dx": x.grad}
    for i, (y, (bias, A, B)) in enumerate(zip(ys, leaves, strict=True)):
        found |= {f"y{i}": y.detach(), f"dA{i}": A.grad, f"dB{i}": B.grad}
        if bias is not None:
            found[f"dbias{i}"] = bias.grad
    return found


def _dense(weight, dtype):
    return weight.dequantize(dtype) if isinstance(weight, NF4Weight) else weight


def _exact(mask):
    def call(x, members):
        return [
            reference.adapted_linear(
                x, _dense(m.weight, FP32).cpu().double(), m.bias, A=m.A, B=m.B, scaling=m.scaling,
                dropout_p=0.0 if mask is None else 0.3, dropout_mask=mask,
            )
            for m in members
        ]  # fmt: skip

    return call


def _eager(dtype, mixed, mask):
    def call(x, members):
        with torch.autocast("cpu", dtype=dtype, enabled=mixed):
            linear = torch.nn.functional.linear
            dropped = x if mask is None else x * mask / 0.7
            return [
                linear(x, _dense(m.weight, dtype).cpu(), m.bias)
                + linear(linear(dropped, m.A), m.B) * m.scaling
                for m in members
            ]

    return call


def check(dtype, adapter, nf4, device="cpu", drops=False, idle=(), **options):
    """The rule for every result; the outputs `idle` lead to no loss."""
    x, members, dYs = make(dtype, adapter, nf4, device=device, **options)
    dYs = [None if i in idle else dY for i, dY in enumerate(dYs)]
    mask = backend_for(x.device).dropout_mask(11, *x.shape, 0.3, x.device).cpu() if drops else None
    call = _with_dropout if drops else adapted_linears
    results = results_of(call, x, members, dYs, lambda t: t)
    exact = results_of(_exact(mask), x, members, dYs, lambda t: t.detach().cpu().double())
    plain = _eager(dtype, {*_each(adapter)} != {dtype}, mask)
    eager = orders(lambda: results_of(plain, x, members, dYs, lambda t: t.detach().cpu()))
    # NF4 weights are exact in float32 and rounded to the compute dtype: that is the weight here.
    assert_all_accurate(results, exact, eager, compute_dtype=dtype)
    return results
