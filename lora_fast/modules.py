"""Adapted linear layers as plain ``nn.Module``s, without PEFT."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base_linear import (
    CallCounts,
    adapted,
    base_obstacle,
    call_obstacle,
    environment_obstacle,
    is_four_bit,
    tensor_obstacle,
)
from .merging import KeptWeight, LowRank, Subtraction, merge, merged_linear
from .validation import check_probability


@dataclass(frozen=True, eq=False)
class KeptLayer:
    """The NF4 layer in whose place a dense, merged one stands."""

    layer: Any


class LoRALinear(nn.Module):
    """y = x Wᵀ + s · (drop(x) Aᵀ) Bᵀ + bias, with s = α/R, or α/√R for rsLoRA.

    x [..., K] → y [..., N]. ``base_layer`` holds the frozen W [N, K], dense or NF4, and bias [N];
    ``lora_A`` [R, K] and ``lora_B`` [N, R] train. y has the dtype that ``base_layer`` alone gives.
    Sources: LoRA (Hu et al. 2021, eq. 3), rsLoRA (Kalajdzievski 2023),
    QLoRA (Dettmers et al. 2023, eq. 5).
    """

    def __init__(
        self,
        base_layer: Any,
        *,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_lora_arguments(r, lora_alpha, lora_dropout, dtype)
        check_base(base_layer)
        self.base_layer = base_layer.requires_grad_(False)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        device = base_layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, device=device, dtype=dtype))
        self._undo: KeptWeight | Subtraction | KeptLayer | None = None
        self._lora_fast_calls = CallCounts()
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Module, **arguments: Any) -> LoRALinear:
        """Adapt an ``nn.Linear`` or a quantised NF4 ``bitsandbytes.nn.Linear4bit``.

        `linear` becomes ``base_layer`` itself, not a copy, and is frozen. `arguments` are those of
        the class: r ≥ 1, lora_alpha, lora_dropout in [0, 1], use_rslora, and the dtype of the
        adapter, by default float32 as in PEFT.
        Raises TypeError or ValueError that names the argument.
        """
        return cls(linear, **arguments).train(linear.training)

    def reset_parameters(self) -> None:
        """PEFT's initialisation: A as the weight of an ``nn.Linear``, B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def merged(self) -> bool:
        return self._undo is not None

    def forward(self, x: Tensor) -> Tensor:
        found = self.obstacle() or call_obstacle(self.base_layer, x, self.lora_A, self.lora_B)
        if found is not None:
            self._lora_fast_calls.add_fallback(found)
            return self.base_layer(x) if self.merged else self._plain(x)
        y = adapted(
            self.base_layer,
            x,
            A=self.lora_A,
            B=self.lora_B,
            scaling=self.scaling,
            bias=self.base_layer.bias,
            dropout_p=self._dropout_p,
        )
        self._lora_fast_calls.fused += 1
        return y

    def obstacle(self) -> str | None:
        """Why the next call would run plain PyTorch, None if it would run fused."""
        return (
            environment_obstacle()
            or ("merged" if self.merged else None)
            or tensor_obstacle(self.lora_A, "lora_A")
            or tensor_obstacle(self.lora_B, "lora_B")
            or base_obstacle(self.base_layer)
        )

    def merge(self, *, keep_weight: bool = True, dequantize: bool = False) -> None:
        """W ← W + s B A, computed in float32 and rounded (or quantised) once.

        ``keep_weight=True`` keeps the unmerged weight for :meth:`unmerge`, which is then exact to
        the bit. ``keep_weight=False`` overwrites a dense W in place; unmerging subtracts, to within
        one ulp of the larger of W and W + s B A. ``dequantize=True`` gives an NF4 layer a dense
        weight, in the dtype it had before it was quantised, until it is unmerged.
        RuntimeError if already merged, ValueError if the merged weight is not finite; the layer is
        then as it was. The bounds are in :mod:`lora_fast.merging`.
        """
        if self.merged:
            raise RuntimeError("merge() must be called on an unmerged layer, got a merged one")
        terms = [LowRank(self.lora_A.detach(), self.lora_B.detach(), self.scaling)]
        if dequantize and is_four_bit(self.base_layer):
            merged = merged_linear(self.base_layer, terms)
            self._undo, self.base_layer = KeptLayer(self.base_layer), merged
        else:
            self._undo = merge(self.base_layer, terms, keep=keep_weight)

    def unmerge(self) -> None:
        """Give the layer the weight from before :meth:`merge`. RuntimeError if unmerged."""
        if self._undo is None:
            raise RuntimeError("unmerge() must be called on a merged layer, got an unmerged one")
        if isinstance(self._undo, KeptLayer):
            self.base_layer = self._undo.layer.to(self.base_layer.weight.device)
        else:
            self._undo.restore(self.base_layer)
        self._undo = None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, "
            f"scaling={self.scaling:g}, merged={self.merged}"
        )

    @property
    def _dropout_p(self) -> float:
        return self.lora_dropout if self.training else 0.0

    def _plain(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        rows = F.dropout(x, self.lora_dropout, self.training).to(self.lora_A.dtype)
        return (y + F.linear(F.linear(rows, self.lora_A), self.lora_B) * self.scaling).to(y.dtype)


def check_lora_arguments(r: Any, lora_alpha: Any, lora_dropout: Any, dtype: Any) -> None:
    """Raise unless r ≥ 1, lora_alpha is finite, lora_dropout in [0, 1] and dtype a floating one."""
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be an int, got {type(r).__name__}")
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, (int, float)):
        raise TypeError(f"lora_alpha must be a number, got {type(lora_alpha).__name__}")
    if not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be finite, got {lora_alpha}")
    check_probability("lora_dropout", lora_dropout)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point dtype, got {dtype}")


def check_base(linear: Any) -> None:
    """Raise unless `linear` is an nn.Linear (TypeError) that can be adapted (ValueError)."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
    found = base_obstacle(linear)
    if found is not None:
        raise ValueError(f"linear must be a plain nn.Linear or an NF4 Linear4bit, got: {found}")
