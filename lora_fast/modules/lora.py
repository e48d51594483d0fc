"""LoRA as a plain ``nn.Module``, without PEFT."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..base_layer.linear import four_bit_dtype, weight_of
from ..base_layer.merging import LowRank
from ..base_layer.obstacles import call_obstacle
from ..factors import Constants, Factors
from ..gated_mlps.operands import Operand
from ..operation.validation import check_probability
from .adapter_module import AdapterModule, check_adapter_dtype, check_rank


class LoRALinear(AdapterModule):
    """y = x Wᵀ + s · (drop(x) Aᵀ) Bᵀ + bias, with s = α/R, or α/√R for rsLoRA.

    x [..., K] → y [..., N]. ``base_layer`` holds the frozen W [N, K], dense or 4-bit, and bias [N];
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
        check_lora_arguments(r, lora_alpha, lora_dropout, dtype)
        super().__init__(base_layer)
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        device = base_layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def from_linear(  # type: ignore[override]  # each by name
        cls,
        linear: nn.Module,
        *,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Adapt a linear layer, which becomes ``base_layer`` itself, not a copy, and is frozen.

        `linear`: an ``nn.Linear`` or a quantised ``bitsandbytes.nn.Linear4bit``.
        `r`: the rank R ≥ 1.
        `lora_alpha`: α, finite; the scaling is α/R.
        `lora_dropout`: the probability in [0, 1] with which training drops an element of x.
        `use_rslora`: scales by α/√R instead.
        `dtype`: that of A and B, float32 as in PEFT.
        Raises TypeError or ValueError that names the argument.
        """
        layer = cls(
            linear, r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora,
            dtype=dtype,
        )  # fmt: skip
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """PEFT's initialisation: A as the weight of an ``nn.Linear``, B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def low_rank(self) -> LowRank:
        return LowRank(self.lora_A, self.lora_B, self.scaling)

    def dropout_p(self) -> float:
        return self.lora_dropout

    def operand(self, x: Tensor, casts: torch.dtype | None) -> Operand | str:
        """The layer as a part of the operation of a gated MLP, for an input like x; `casts` is the
        dtype of autocast. The reason why its own forward must run, if it must."""
        base: Any = self.base_layer
        found = self.obstacle() or call_obstacle(base, x, self.lora_A, self.lora_B)
        if found is not None:
            return found
        constants = Constants(self.scaling, self.lora_dropout if self.training else 0.0)
        W = weight_of(base)
        factors = Factors(W, base.bias, self.lora_A, self.lora_B, constants=constants)
        computes = casts or (x.dtype if isinstance(W, Tensor) else four_bit_dtype(base, x))
        return Operand(factors, computes, computes if isinstance(W, Tensor) else x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, "
            f"scaling={self.scaling:g}, merged={self.merged}"
        )


def check_lora_arguments(r: Any, lora_alpha: Any, lora_dropout: Any, dtype: Any) -> None:
    """Raise unless r ≥ 1, lora_alpha is finite, lora_dropout in [0, 1] and dtype a floating one."""
    check_rank(r)
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, (int, float)):
        raise TypeError(f"lora_alpha must be a number, got {type(lora_alpha).__name__}")
    if not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be finite, got {lora_alpha}")
    check_probability("lora_dropout", lora_dropout)
    check_adapter_dtype(dtype)
