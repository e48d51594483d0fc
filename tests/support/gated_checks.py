"""Gated MLPs: built, computed in every way, and checked by the rule."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from equation import lay_out
from torch import Tensor

from bench.instruments.accuracy import assert_all_accurate, orders
from lora_fast import NF4Weight, reference
from lora_fast.backends.selection import backend_for
from lora_fast.factors import Constants, Factors
from lora_fast.gated import ACTIVATIONS
from lora_fast.operation import gated_mlp

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MEMBERS = ("gate", "up", "down")
# Of the masks of x and of h.
SEEDS = (5, 6)


@dataclass(frozen=True)
class MLP:
    """One MLP. `adapted`, `nf4`, `biased`, `ready`: the linears that have an A and B, a weight in
    NF4, a bias, or are computed elsewhere; `trains`: x and kinds of factors; `frozen`: linears of
    which nothing trains; `fused`: gate and up are one layer; `alone`: h is the result."""

    dtype: torch.dtype = FP32
    adapter: torch.dtype | None = None
    M: int = 37
    H: int = 24
    intermediate: int = 40
    ranks: tuple[int, int, int] = (5, 3, 8)
    activation: str = "silu"
    adapted: tuple[str, ...] = MEMBERS
    nf4: tuple[str, ...] = ()
    biased: tuple[str, ...] = ()
    ready: tuple[str, ...] = ()
    fused: bool = False
    alone: bool = False
    trains: tuple[str, ...] = ("x", "bias", "A", "B")
    frozen: tuple[str, ...] = ()
    p: float = 0.0
    lead: tuple[int, ...] = ()
    layout: str = "contiguous"

    @property
    def members(self) -> tuple[str, ...]:
        absent = ["up"] * self.fused + ["down"] * self.alone
        return tuple(m for m in MEMBERS if m not in absent)


@dataclass
class Operands:
    """`leaves`: tensors by name, as gate.A, or gate for an output that was computed elsewhere."""

    mlp: MLP
    leaves: dict[str, Tensor]
    weights: dict[str, Any]
    dY: Tensor
    masks: dict[str, Tensor] = field(default_factory=dict)


def make(mlp: MLP, device: torch.device | str = "cpu") -> Operands:
    """Random operands, the same at every call and for every device."""
    torch.manual_seed(0)
    width, H, adapter = mlp.intermediate, mlp.H, mlp.adapter or mlp.dtype

    def randn(*shape: int, of: torch.dtype = mlp.dtype, spread: float = 1.0) -> Tensor:
        return (torch.randn(shape, dtype=FP64) * spread).to(of).to(device)

    def laid_out(t: Tensor) -> Tensor:
        t = lay_out(t, mlp.layout)
        return t.reshape(*mlp.lead, t.shape[-1]) if mlp.lead else t

    leaves = {"x": laid_out(randn(mlp.M, H)).requires_grad_("x" in mlp.trains)}
    weights = {}
    for name, R in zip(MEMBERS, mlp.ranks, strict=True):
        N, K = (H, width) if name == "down" else (2 * width if mlp.fused else width, H)
        if name not in mlp.members:
            continue
        if name in mlp.ready:
            leaves[name] = laid_out(randn(mlp.M, N)).requires_grad_(name not in mlp.frozen)
            continue
        weight = randn(N, K, spread=K**-0.5)
        weights[name] = NF4Weight.from_dense(weight) if name in mlp.nf4 else weight
        found = {"bias": randn(N)} if name in mlp.biased else {}
        if name in mlp.adapted:
            found |= {
                "A": randn(R, K, of=adapter, spread=K**-0.5),
                "B": randn(N, R, of=adapter, spread=R**-0.5),
            }
        for kind, factor in found.items():
            leaves[f"{name}.{kind}"] = factor.requires_grad_(
                kind in mlp.trains and name not in mlp.frozen
            )
    masks = {}
    if mlp.p:
        backend, where = backend_for(torch.device(device)), torch.device(device)
        for key, seed, K in (("x", SEEDS[0], H), ("h", SEEDS[1], width)):
            masks[key] = backend.dropout_mask(seed, mlp.M, K, mlp.p, where).cpu()
    dY = laid_out(randn(mlp.M, width if mlp.alone else H))
    return Operands(mlp, leaves, weights, dY, masks)


def fused(o: Operands, leaves: dict[str, Tensor]) -> Tensor:
    """y by the code under test."""
    layers = [factors_of(o, leaves, name) for name in MEMBERS]
    return gated_mlp.compute(
        leaves["x"], *layers, o.mlp.activation, SEEDS if o.mlp.p else (None, None)
    )  # type: ignore[arg-type]


def factors_of(o: Operands, leaves: dict[str, Tensor], name: str) -> Any:
    if name not in o.mlp.members:
        return None
    if name in o.mlp.ready:
        return leaves[name]
    bias, A, B = (leaves.get(f"{name}.{kind}") for kind in ("bias", "A", "B"))
    scaling = 0.5 + MEMBERS.index(name)
    return Factors(o.weights[name], bias, A, B, constants=Constants(scaling, o.mlp.p))


def exact(o: Operands, leaves: dict[str, Tensor]) -> Tensor:
    """y by the reference, in the dtype of the leaves."""
    layers = [arguments_of(o, leaves, name) for name in MEMBERS]
    return reference.gated_mlp(leaves["x"], *layers, o.mlp.activation)


def arguments_of(o: Operands, leaves: dict[str, Tensor], name: str) -> Any:
    if name not in o.mlp.members:
        return None
    if name in o.mlp.ready:
        return leaves[name]
    found = {kind: leaves.get(f"{name}.{kind}") for kind in ("bias", "A", "B")}
    mask = o.masks.get("h" if name == "down" else "x")
    scaling = 0.5 + MEMBERS.index(name)
    return found | {
        "weight": _dense(o, name),
        "scaling": scaling,
        "dropout_p": o.mlp.p,
        "dropout_mask": mask,
    }


def _dense(o: Operands, name: str) -> Tensor:
    weight = o.weights[name]
    return (weight.dequantize(o.mlp.dtype) if isinstance(weight, NF4Weight) else weight).cpu()


def eager(o: Operands, leaves: dict[str, Tensor]) -> Tensor:
    """y by plain PyTorch; autocast where the adapters are wider than x."""
    mlp = o.mlp
    with torch.autocast("cpu", dtype=mlp.dtype, enabled=mlp.adapter not in (None, mlp.dtype)):
        x = leaves["x"]
        gate = _plain(o, leaves, "gate", x)
        gate, up = gate.chunk(2, dim=-1) if mlp.fused else (gate, _plain(o, leaves, "up", x))
        h = ACTS[mlp.activation](gate) * up
        return h if mlp.alone else _plain(o, leaves, "down", h)


def _plain(o: Operands, leaves: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    if name in o.mlp.ready:
        return leaves[name]
    linear = torch.nn.functional.linear
    y = linear(x, _dense(o, name), leaves.get(f"{name}.bias"))
    A, B = leaves.get(f"{name}.A"), leaves.get(f"{name}.B")
    if A is None or B is None:
        return y
    mask = o.masks.get("h" if name == "down" else "x")
    dropped = x if mask is None else x * mask.reshape(x.shape) / max(1.0 - o.mlp.p, 1e-30)
    return y + linear(linear(dropped, A), B) * (0.5 + MEMBERS.index(name))


ACTS: dict[str, Any] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda gate: torch.nn.functional.gelu(gate, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda gate: torch.relu(gate).square(),
}
assert set(ACTS) == set(ACTIVATIONS)


def results_of(o: Operands, call: Any, convert: Any = lambda t: t) -> dict[str, Tensor | None]:
    """The output and all gradients."""
    leaves = {
        name: convert(leaf).detach().requires_grad_(leaf.requires_grad)
        for name, leaf in o.leaves.items()
    }
    y = call(o, leaves)
    if y.requires_grad:
        y.backward(convert(o.dY).to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def check(mlp: MLP, device: torch.device | str = "cpu", **changes: Any) -> dict[str, Tensor | None]:
    """The rule for every result."""
    mlp = replace(mlp, **changes)
    o = make(mlp, device)
    results = results_of(o, fused)
    assert_all_accurate(
        results,
        results_of(o, exact, lambda t: t.detach().cpu().double()),
        orders(lambda: results_of(o, eager, lambda t: t.detach().cpu())),
        compute_dtype=mlp.dtype,
        name=str(mlp),
        # Equal rows have equal errors, of which a sum is none the better.
        layers=(1 if mlp.alone else 2) + (mlp.layout == "zero-stride"),
    )
    return results
