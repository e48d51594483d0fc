"""Cases of the equation: operands, and its outputs and gradients by three routes.

``fused``     functional.adapted_linear with the current backend
``exact``     the reference in float64, autograd
``eager``     plain PyTorch in the dtypes under test, as stock PEFT computes, in three orders of
              summation: the yardstick
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench.instruments.accuracy import assert_all_accurate, assert_same_bits, orders
from lora_fast import NF4Weight, functional, reference
from lora_fast.backends.selection import backend_for

FACTORS = ("x", "bias", "A", "B", "b", "d", "g")


@dataclass(frozen=True)
class Case:
    """One point in the space of shapes, dtypes, strides and factors."""

    M: int = 70
    K: int = 72
    N: int = 88
    R: int = 5
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    nf4: bool = False
    quant_type: str = "nf4"
    nested: bool = True
    blocksize: int = 64
    factors: tuple[str, ...] = ("x", "bias", "A", "B")
    trains: tuple[str, ...] | None = None
    p: float = 0.0
    seed: int = 3
    scaling: float = 0.7
    x_layout: str = "contiguous"
    dY_layout: str = "contiguous"
    lead: tuple[int, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        names = [str(self.dtype).removeprefix("torch.")]
        if self.adapter_dtype:
            names.append("adapter-" + str(self.adapter_dtype).removeprefix("torch."))
        names += [
            self.quant_type if self.nf4 else "dense",
            f"{self.M}x{self.K}x{self.N}",
            f"R{self.R}",
        ]
        names += [name for name in ("b", "d", "g") if name in self.factors]
        names += [f"p{self.p}"] * (self.p > 0)
        names += [f"x-{self.x_layout}"] * (self.x_layout != "contiguous")
        names += [f"dY-{self.dY_layout}"] * (self.dY_layout != "contiguous")
        names += [f"spans{len(self.spans)}"] * bool(self.spans)
        return "-".join(names)


@dataclass
class Operands:
    """Tensors of a case, on a device; x and dY in their layouts."""

    case: Case
    tensors: dict[str, torch.Tensor]
    weight: Any
    dense: torch.Tensor
    dY: torch.Tensor
    mask: torch.Tensor | None = field(default=None)

    @property
    def spans(self) -> torch.Tensor | None:
        """rank_spans [samples, 2], on the device of dY."""
        rows = self.case.spans
        return torch.tensor(rows, dtype=torch.int32, device=self.dY.device) if rows else None


def lay_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides (for zero-stride: the first row, repeated)."""
    if layout == "contiguous":
        return values
    if layout == "transposed":
        return values.mT.contiguous().mT
    if layout == "sliced":
        wide = torch.zeros(*values.shape[:-1], 2 * values.shape[-1] + 3, dtype=values.dtype)
        wide = wide.to(values.device)
        wide[..., 1 : 1 + 2 * values.shape[-1] : 2] = values
        return wide[..., 1 : 1 + 2 * values.shape[-1] : 2]
    if layout == "zero-stride":
        return values[:1].expand_as(values)
    raise ValueError(f"layout must be a known one, got {layout!r}")


def make(case: Case, device: torch.device | str = "cpu") -> Operands:
    """Random operands of a case, the same at every call and for every device."""
    torch.manual_seed(0)
    adapter = case.adapter_dtype or case.dtype
    M, K, N, R = case.M, case.K, case.N, case.R
    shapes = {"x": (M, K), "bias": (N,), "A": (R, K), "B": (N, R), "b": (N,), "d": (R,), "g": (N,)}
    trains = case.factors if case.trains is None else case.trains
    tensors = {}
    for name in case.factors:
        dtype = case.dtype if name in ("x", "bias") else adapter
        values = torch.randn(shapes[name], dtype=torch.float64).to(dtype).to(device)
        if name == "x":
            values = lay_out(values, case.x_layout)
            values = values.reshape(*case.lead, K) if case.lead else values
        tensors[name] = values.requires_grad_(name in trains)
    dense = torch.randn(N, K, dtype=torch.float64).to(case.dtype).to(device)
    weight: Any = dense
    if case.nf4:
        weight = NF4Weight.from_dense(
            dense,
            blocksize=case.blocksize,
            double_quant=case.nested,
            quant_type=case.quant_type,
        )
        dense = weight.dequantize(case.dtype)
    dY = lay_out(torch.randn(M, N).to(case.dtype).to(device), case.dY_layout)
    mask = None
    if case.p:
        mask = (
            backend_for(torch.device(device))
            .dropout_mask(case.seed, M, K, case.p, torch.device(device))
            .cpu()
        )
    dY = dY.reshape(*case.lead, N) if case.lead else dY
    return Operands(case, tensors, weight, dense, dY, mask)


def fused(o: Operands) -> dict[str, torch.Tensor | None]:
    """Output and gradients by the code under test."""

    def call(t: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional.adapted_linear(
            t["x"], o.weight, t.get("bias"), A=t.get("A"), B=t.get("B"), b=t.get("b"), d=t.get("d"),
            g=t.get("g"), scaling=o.case.scaling, dropout_p=o.case.p,
            dropout_seed=o.case.seed if o.case.p else None, rank_spans=o.spans,
        )  # fmt: skip

    return _differentiate(o, call, lambda value: value)


def exact(o: Operands) -> dict[str, torch.Tensor | None]:
    """Output and gradients by the reference in float64, with the mask that the backend used."""

    def call(t: dict[str, torch.Tensor]) -> torch.Tensor:
        return reference.adapted_linear(
            t["x"], o.dense.cpu().double(), t.get("bias"), A=t.get("A"), B=t.get("B"),
            b=t.get("b"), d=t.get("d"), g=t.get("g"), scaling=o.case.scaling, dropout_p=o.case.p,
            dropout_mask=o.mask, rank_spans=None if o.spans is None else o.spans.cpu(),
        )  # fmt: skip

    return _differentiate(o, call, lambda value: value.detach().cpu().double())


def eager(o: Operands) -> dict[str, list[torch.Tensor] | None]:
    """Output and gradients by plain PyTorch; autocast where the adapter is wider than x.

    Of each there are three, which differ in their orders of summation.
    """
    case = o.case

    def call(t: dict[str, torch.Tensor]) -> torch.Tensor:
        mixed = case.adapter_dtype not in (None, case.dtype)
        with torch.autocast("cpu", dtype=case.dtype, enabled=mixed):
            return _eager_forward(t, o)

    return orders(lambda: _differentiate(o, call, lambda value: value.detach().cpu()))


def stock(o: Operands) -> dict[str, list[torch.Tensor] | None]:
    """Output and gradients by plain PyTorch without autocast, as PEFT computes around a 16-bit
    base: adapters in their own dtype, and so what their gradients pass through. Of each three."""
    return orders(
        lambda: _differentiate(
            o, lambda leaves: _eager_forward(leaves, o), lambda value: value.detach().cpu()
        )
    )


def _eager_forward(t: dict[str, torch.Tensor], o: Operands) -> torch.Tensor:
    x, linear = t["x"], torch.nn.functional.linear
    V = linear(x, o.dense.cpu())
    if "A" in t:
        dropped = x
        if o.mask is not None:
            dropped = x * o.mask.reshape(x.shape) / max(1.0 - o.case.p, 1e-30)
        U = linear(dropped.to(t["A"].dtype), t["A"])
        if o.spans is not None:
            U = U * torch.cat([_inside(span, o.case) for span in o.case.spans]).to(U.dtype)
        U = U * t["d"] if "d" in t else U
        Q = linear(U, t["B"])
        Q = Q * t["b"] if "b" in t else Q
        V = V + Q * o.case.scaling
    V = V * t["g"] if "g" in t else V
    V = V + t["bias"] if "bias" in t else V
    return V.to(o.case.dtype)


def _inside(span: tuple[int, int], case: Case) -> torch.Tensor:
    """[rows of a sample, R]: 1 in the columns of the span, else 0."""
    columns = torch.arange(case.R)
    inside = (columns >= span[0]) & (columns < span[1])
    return inside.expand(case.M // len(case.spans), case.R)


def _differentiate(
    o: Operands,
    call: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    convert: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor | None]:
    leaves = {
        name: convert(value).detach().requires_grad_(value.requires_grad)
        for name, value in o.tensors.items()
    }
    y = call(leaves)
    results: dict[str, torch.Tensor | None] = {"y": y.detach()}
    if y.requires_grad:
        y.backward(convert(o.dY).to(y.dtype))
    for name, leaf in leaves.items():
        results["d" + name] = leaf.grad
    return results


def check(case: Case, device: torch.device | str = "cpu") -> dict[str, torch.Tensor | None]:
    """Assert the accuracy rule for a case; returns what the code under test computed."""
    operands = make(case, device)
    results = fused(operands)
    assert_all_accurate(
        results, exact(operands), eager(operands), compute_dtype=case.dtype, name=str(case)
    )
    return results


def variations(base: Case, **axes: tuple[Any, ...]) -> list[Case]:
    """The base case with one field changed at a time."""
    return [base] + [
        replace(base, **{name: value})
        for name, values in axes.items()
        for value in values
        if value != getattr(base, name)
    ]


def check_rows_keep_apart(
    case: Case, value: float, device: torch.device | str = "cpu", x_row: int = 17, dY_row: int = 5
) -> None:
    """Assert that `value` (not finite) in a row of x spoils that row of y, and in a row of dY that
    of dX, and that all other rows keep their bits."""
    clean, spoilt = make(case, device), make(case, device)
    with torch.no_grad():
        spoilt.tensors["x"][x_row] = value
        spoilt.dY[dY_row] = value
    expected, results = fused(clean), fused(spoilt)
    for name, row in (("y", x_row), ("dx", dY_row)):
        actual, wanted = results[name], expected[name]
        assert actual is not None and wanted is not None
        assert not actual[row].isfinite().any(), name
        others = torch.arange(case.M) != row
        assert_same_bits(actual[others], wanted[others], name=name)
