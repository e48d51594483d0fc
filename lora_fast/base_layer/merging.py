"""Merging adapters into the weight of their frozen base layer, and unmerging them.

    W' = round( g ⊙ (W + Σ_i s_i · (b_i ⊙ (B_i d_i)) A_i) )

One pass over W, float32 products and sums (float64 for a float64 W), one rounding to W's dtype or
one quantisation to 4 bits. With u = eps / 2 of W's dtype, γ = (ΣR + 4) · 2⁻²⁴ (2⁻⁵³ for float64)
and the exact W*, every element of a dense W' obeys

    |W' − W*| ≤ u · |W*| + γ · |g| (|W| + Σ_i |s_i b_i B_i d_i| |A_i|)

(and half of the smallest number of the dtype, where W* is subnormal); so the merged layer differs
from the unmerged one by at most Σ_k |x_k| times that, and the roundings of the two layers
themselves. For NF4 the bound is 0.152 times the block's absmax, for FP4 0.167 times, half the
widest gap between codes, and the error that double quantisation makes in that absmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.selection import backend_for
from ..four_bit import is_four_bit
from ..nf4 import NF4Weight
from .linear import weight_shape

# Elements of a weight that are checked at a time before it is overwritten.
_TRIAL_ELEMENTS = 1 << 22


@dataclass(frozen=True, eq=False)
class LowRank:
    """s · (b ⊙ (B d)) A, the update of W by one adapter. A [R, K], B [N, R], b [N], d [R]."""

    A: Tensor
    B: Tensor
    scaling: float | Tensor = 1.0
    b: Tensor | None = None
    d: Tensor | None = None

    def copy(self, device: torch.device) -> LowRank:
        """A copy on `device`, independent of later changes of the adapter."""
        tensors = {
            name: value.detach().to(device, copy=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


@dataclass(frozen=True, eq=False)
class KeptWeight:
    """Undoes a merge exactly: keeps the original weight in memory."""

    weight: nn.Parameter

    def restore(self, base: Any) -> None:
        """Restore the weight, on the current device and in the current dtype of `base`."""
        now, weight = base.weight, self.weight
        if is_four_bit(base):
            _set_four_bit(base, weight if weight.device == now.device else weight.to(now.device))
        elif (weight.device, weight.dtype) == (now.device, now.dtype):
            base.weight = weight
        else:
            base.weight = nn.Parameter(weight.to(now.device, now.dtype), requires_grad=False)


@dataclass(frozen=True, eq=False)
class Subtraction:
    """Undoes a merge in place, without a second W in memory: W'' = round(W' − Δ).

    Δ is computed as for the merge, so W'' is within one ulp of W, an ulp at the magnitude of the
    larger of W and W + Δ.
    """

    terms: tuple[LowRank, ...]

    def restore(self, base: Any) -> None:
        """Subtract the adapters from the current weight of `base`."""
        weight = base.weight.detach()
        add_low_rank(weight, [term.copy(weight.device) for term in self.terms], sign=-1.0)


@torch.no_grad()
def merge(
    base: Any, terms: Sequence[LowRank], *, g: Tensor | None = None, keep: bool = True
) -> KeptWeight | Subtraction:
    """Give `base`, an ``nn.Linear`` or 4-bit ``Linear4bit``, the weight W'; returns what undoes it.

    4 bits are quantised again with the same table, block size and nesting. ``keep=True`` puts a new
    tensor in the place of W, which other references to W do not see, and keeps W. ``keep=False``
    overwrites W in place if subtraction can undo that: a 4-bit weight, and any weight with a gain,
    are kept anyway.

    Raises ValueError, with `base` unchanged, if W' is not finite in the dtype of the weight or if
    factors do not fit it.
    """
    _check_terms(base, terms, g)
    old = base.weight
    if is_four_bit(base):
        merged = NF4Weight.from_params4bit(old).dequantize(torch.float32)
        add_low_rank(merged, terms, g)
        _check_finite(merged, old.quant_state.dtype)
        _set_four_bit(base, _quantised_like(old, merged))
        return KeptWeight(old)
    weight = old.detach()
    if keep or g is not None:
        merged = torch.empty_like(weight)
        add_low_rank(weight, terms, g, out=merged)
        _check_finite(merged, merged.dtype)
        base.weight = nn.Parameter(merged, requires_grad=False)
        return KeptWeight(old)
    _try_out(weight, terms)
    add_low_rank(weight, terms)
    return Subtraction(tuple(term.copy(weight.device) for term in terms))


@torch.no_grad()
def merged_linear(
    base: Any,
    terms: Sequence[LowRank],
    *,
    g: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Linear:
    """A dense ``nn.Linear`` with the weight W' in `dtype` and the bias of `base`, which does not
    change.

    `dtype` is by default that of W, for 4 bits the dtype before quantisation. Raises
    ValueError if W' is not finite in `dtype` or if factors do not fit `base`.
    """
    _check_terms(base, terms, g)
    if is_four_bit(base):
        source = NF4Weight.from_params4bit(base.weight)
        weight, wanted = source.dequantize(torch.float32), dtype or source.dtype
    else:
        weight, wanted = base.weight.detach(), dtype or base.weight.dtype
    merged = torch.empty_like(weight, dtype=wanted)
    add_low_rank(weight, terms, g, out=merged)
    _check_finite(merged, wanted)
    linear = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(merged, requires_grad=False)
    linear.bias = base.bias
    return linear.train(base.training)


def add_low_rank(
    weight: Tensor,
    terms: Sequence[LowRank],
    g: Tensor | None = None,
    *,
    out: Tensor | None = None,
    sign: float = 1.0,
) -> None:
    """out ← round(g ⊙ (W + sign · Σ_i s_i · (b_i ⊙ (B_i d_i)) A_i)); W itself without `out`."""
    factors = _stacked(terms, weight.dtype, sign)
    out = weight if out is None else out
    backend_for(weight.device).update_weight(weight, out, g=g, **factors)


def overwrite_four_bit(weight: Any, dense: Tensor) -> None:
    """Quantise `dense` [N, K] into the storage of the 4-bit `weight` (a Params4bit)."""
    now = NF4Weight.from_params4bit(weight)
    then = NF4Weight.from_dense(
        dense,
        blocksize=now.blocksize,
        double_quant=now.nested,
        quant_type=now.quant_type,
    )
    for old, new in zip(four_bit_tensors(now), four_bit_tensors(then), strict=True):
        old.copy_(new)


def four_bit_tensors(weight: NF4Weight) -> tuple[Tensor, ...]:
    """The tensors of a 4-bit weight: all that quantising other values would change."""
    state = weight.quant_state
    nested = (state.state2.absmax, state.offset) if weight.nested else ()
    return (weight.packed, state.absmax, *nested)


def _stacked(terms: Sequence[LowRank], dtype: torch.dtype, sign: float) -> dict[str, Any]:
    """One A [ΣR, K] and B [N, ΣR] for the sum, and the factors that still multiply them."""
    if not terms:
        return {}
    first, device = terms[0], terms[0].A.device
    if len(terms) == 1 and not isinstance(first.scaling, Tensor):
        fields = vars(first)
        return {**fields, "scaling": sign * first.scaling}
    scaled = []
    for term in terms:
        B = _widened(term.B, dtype)
        for vector in (term.d, None if term.b is None else term.b.unsqueeze(1)):
            B = B if vector is None else B * vector
        scaling = term.scaling
        scaled.append(B * (scaling.to(device) if isinstance(scaling, Tensor) else scaling))
    A = torch.cat([_widened(term.A, dtype) for term in terms])
    return {"A": A, "B": torch.cat(scaled, dim=1), "scaling": sign}


def _widened(factor: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(factor.dtype, torch.promote_types(dtype, torch.float32))
    return factor.detach().to(wide)


def _try_out(weight: Tensor, terms: Sequence[LowRank]) -> None:
    """Raise if W' would not be finite, before W is overwritten."""
    rows = max(1, _TRIAL_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        merged = torch.empty_like(weight[part])
        few = [replace(t, B=t.B[part], b=None if t.b is None else t.b[part]) for t in terms]
        add_low_rank(weight[part], few, out=merged)
        _check_finite(merged, merged.dtype)


def _check_finite(merged: Tensor, dtype: torch.dtype) -> None:
    largest = torch.stack(torch.aminmax(merged)).abs().max()
    if not largest <= torch.finfo(dtype).max:
        raise ValueError(f"the merged weight must be finite in {dtype}, got NaN or infinity")


def _check_terms(base: Any, terms: Sequence[LowRank], g: Tensor | None) -> None:
    (N, K), device = weight_shape(base), base.weight.device
    for term in terms:
        R = term.A.shape[0]
        expected = {"A": (R, K), "B": (N, R), "b": (N,), "d": (R,)}
        for name, shape in expected.items():
            _check_factor(name, getattr(term, name), shape, device)
    _check_factor("g", g, (N,), device)


def _check_factor(
    name: str, factor: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> None:
    if factor is None:
        return
    if tuple(factor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(factor.shape)}")
    if factor.device != device:
        raise ValueError(f"{name} must be on the weight's device {device}, got {factor.device}")


def _quantised_like(weight: Any, dense: Tensor) -> Any:
    from bitsandbytes.nn import Params4bit

    state = weight.quant_state
    packed = Params4bit(
        dense,
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=weight.quant_storage,
    ).to(dense.device)
    # Quantised from float32, but with the original dtype recorded.
    packed.quant_state.dtype = state.dtype
    return packed


def _set_four_bit(base: Any, weight: Any) -> None:
    base.weight = weight
    base.quant_state = weight.quant_state
