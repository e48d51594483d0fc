"""The base class of lora_fast's adapted linear modules: the call, the fallback, merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base_layer.call_counts import CallCounts
from ..base_layer.linear import adapted
from ..base_layer.merging import KeptWeight, LowRank, Subtraction, merge, merged_linear
from ..base_layer.obstacles import (
    base_obstacle,
    call_obstacle,
    environment_obstacle,
    tensor_obstacle,
)
from ..four_bit import is_four_bit
from ..four_bit.layout import forbid_packing


@dataclass(frozen=True, eq=False)
class KeptLayer:
    """The 4-bit layer that a dense, merged one replaces."""

    layer: Any


class AdapterModule(nn.Module):
    """y = g ⊙ (x Wᵀ + s · b ⊙ ((d ⊙ (drop(x) Aᵀ)) Bᵀ)) + bias on a frozen ``base_layer``.

    A subclass holds the parameters and maps them to the equation: :meth:`low_rank`, :meth:`gain`
    and :meth:`dropout_p`.
    """

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        check_base(base_layer)
        forbid_packing(base_layer)
        self.base_layer = base_layer.requires_grad_(False)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self._undo: KeptWeight | Subtraction | KeptLayer | None = None
        self._lora_fast_calls = CallCounts()

    @classmethod
    def from_linear(cls, linear: nn.Module, **arguments: Any) -> Self:
        """Adapt an ``nn.Linear`` or a quantised ``bitsandbytes.nn.Linear4bit``.

        `linear` becomes ``base_layer`` itself, not a copy, and is frozen. `arguments` are those of
        the class. Raises TypeError or ValueError that names the argument.
        """
        return cls(linear, **arguments).train(linear.training)

    def low_rank(self) -> LowRank:
        """The current A [R, K], B [N, R], s, b [N] and d [R]."""
        raise NotImplementedError

    def gain(self) -> Tensor | None:
        """The current g [N], or None."""
        return None

    def dropout_p(self) -> float:
        """The dropout probability in training."""
        raise NotImplementedError

    @property
    def weight(self) -> Any:
        """W of ``base_layer``, for code that asks a linear layer for its dtype, device or shape.

        Read-only: a product with this weight would leave out the adapter, which is what trains.
        """
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of ``base_layer``, frozen like W."""
        return self.base_layer.bias

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise AttributeError(f"{name} must be set on base_layer, got it on the adapted layer")
        super().__setattr__(name, value)

    @property
    def merged(self) -> bool:
        return self._undo is not None

    def forward(self, x: Tensor) -> Tensor:
        term = self.low_rank()
        found = self.obstacle() or call_obstacle(self.base_layer, x, term.A, term.B, term.b, term.d)
        if found is not None:
            self._lora_fast_calls.add_fallback(found)
            return self.base_layer(x) if self.merged else self._plain(x)
        y = adapted(
            self.base_layer,
            x,
            bias=self.base_layer.bias,
            A=term.A,
            B=term.B,
            scaling=term.scaling,
            b=term.b,
            d=term.d,
            g=self.gain(),
            dropout_p=self.dropout_p() if self.training else 0.0,
        )
        self._lora_fast_calls.add_fused()
        return y

    def obstacle(self) -> str | None:
        """Why the next call would run plain PyTorch, None if it would run fused."""
        found = environment_obstacle() or ("merged" if self.merged else None)
        for name, parameter in self._parameters.items():
            found = found or tensor_obstacle(parameter, name)
        return found or base_obstacle(self.base_layer)

    def merge(self, *, keep_weight: bool = True, dequantize: bool = False) -> None:
        """W ← g ⊙ (W + s · (b ⊙ (B d)) A), in float32 and rounded (or quantised) once.

        ``keep_weight=True`` keeps the unmerged weight for :meth:`unmerge`, which is then exact to
        the bit. ``keep_weight=False`` overwrites a dense W in place; unmerging subtracts, to within
        one ulp of the larger of the two weights (three for float32 with g). ``dequantize=True``
        gives a 4-bit layer a dense weight, in its dtype before quantisation, until it is unmerged.
        RuntimeError if already merged, ValueError if the merged weight is not finite; the layer is
        then as it was. The bounds are in :mod:`lora_fast.base_layer.merging`.
        """
        if self.merged:
            raise RuntimeError("merge() must be called on an unmerged layer, got a merged one")
        terms, gain = [_detached(self.low_rank())], self.gain()
        g = None if gain is None else gain.detach()
        if dequantize and is_four_bit(self.base_layer):
            merged = merged_linear(self.base_layer, terms, g=g)
            self._undo, self.base_layer = KeptLayer(self.base_layer), merged
        else:
            self._undo = merge(self.base_layer, terms, g=g, keep=keep_weight)

    def unmerge(self) -> None:
        """Give the layer the weight from before :meth:`merge`. RuntimeError if unmerged."""
        if self._undo is None:
            raise RuntimeError("unmerge() must be called on a merged layer, got an unmerged one")
        if isinstance(self._undo, KeptLayer):
            self.base_layer = self._undo.layer.to(self.base_layer.weight.device)
        else:
            self._undo.restore(self.base_layer)
        self._undo = None

    def _plain_gain(self) -> Tensor | None:
        """g in PyTorch's own operations."""
        return self.gain()

    def _plain(self, x: Tensor) -> Tensor:
        y, term = self.base_layer(x), self.low_rank()
        S = F.linear(F.dropout(x, self.dropout_p(), self.training).to(term.A.dtype), term.A)
        delta = F.linear(S if term.d is None else S * term.d, term.B) * term.scaling
        delta = delta if term.b is None else delta * term.b
        g = self._plain_gain()
        if g is None:
            return (y + delta).to(y.dtype)
        bias = 0.0 if self.base_layer.bias is None else self.base_layer.bias
        return ((y - bias + delta) * g + bias).to(y.dtype)


def _detached(term: LowRank) -> LowRank:
    return LowRank(**{n: v.detach() if isinstance(v, Tensor) else v for n, v in vars(term).items()})


def check_rank(r: Any) -> None:
    """Raise unless `r` is an integer of at least 1."""
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be an int, got {type(r).__name__}")
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")


def check_adapter_dtype(dtype: Any) -> None:
    """Raise unless `dtype` is a floating one."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point dtype, got {dtype}")


def check_base(linear: Any) -> None:
    """Raise unless `linear` is an nn.Linear (TypeError) that can be adapted (ValueError)."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
    found = base_obstacle(linear)
    if found is not None:
        raise ValueError(
            f"linear must be a plain nn.Linear or a quantised Linear4bit, got: {found}"
        )
