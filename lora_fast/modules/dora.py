"""DoRA as a plain ``nn.Module``, without PEFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..base_layer.linear import weight_of
from ..base_layer.row_norms import row_norms
from ..nf4 import NF4Weight
from .lora import LoRALinear


class DoRALinear(LoRALinear):
    """y = g ⊙ (x Wᵀ + s · (drop(x) Aᵀ) Bᵀ) + bias, with g = m / ‖W + s B A‖ of every row.

    ``lora_magnitude_vector`` m [N] trains beside ``lora_A`` and ``lora_B`` and starts as the norms
    of the rows; in the backward pass the norm is a constant. Everything else is as in
    :class:`LoRALinear`, arguments included. Dropout acts only on the input of A, while PEFT's DoRA
    drops the input of everything that m scales; without dropout the two agree.
    Source: DoRA (Liu et al. 2024, eq. 5 and §4.3).
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
        super().__init__(
            base_layer, r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
            use_rslora=use_rslora, dtype=dtype,
        )  # fmt: skip
        norms = row_norms(weight_of(base_layer), self.lora_A, self.lora_B, self.scaling)
        self.lora_magnitude_vector = nn.Parameter(norms.to(self.lora_A.dtype, copy=True))

    def gain(self) -> Tensor:
        if self.merged:
            raise RuntimeError("gain() must be called on an unmerged layer, got a merged one")
        weight = weight_of(self.base_layer)
        norms = row_norms(weight, self.lora_A, self.lora_B, self.scaling)
        return self.lora_magnitude_vector / norms

    def _plain_gain(self) -> Tensor:
        weight = weight_of(self.base_layer)
        W = weight.dequantize() if isinstance(weight, NF4Weight) else weight
        with torch.no_grad():
            wide = torch.promote_types(W.dtype, torch.float32)
            merged = W.to(wide) + self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide))
            norms = torch.linalg.vector_norm(merged, dim=1)
        return self.lora_magnitude_vector / norms
