"""Attention-like parents of three LoRA layers, and the number of products that their calls take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lora_models import K, quantised
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

# Matrix products of one layer alone, and of two and three in a group: W and B of each, one for A.
ALONE, TWO, THREE = 3, 5, 7


class Between(nn.Module):
    """What a test wants to happen after the first sibling: ``action(attention)``."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.__dict__["attention"] = attention
        self.action: Callable[[Any], None] = do_nothing

    def forward(self, y: Tensor) -> Tensor:
        self.action(self.attention)
        return y


def do_nothing(attention: Any) -> None:
    pass


class Attention(nn.Module):
    """Three projections of one x, of two widths, put together by something that is not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(K, 20)
        self.k_proj = nn.Linear(K, 12, bias=False)
        self.v_proj = nn.Linear(K, 12)
        self.between = Between(self)

    def forward(self, x: Tensor) -> Tensor:
        q = self.between(self.q_proj(x))
        k = self.k_proj(x)
        v = self.v_proj(x)
        return torch.cat([torch.tanh(q), k * v], dim=-1)


class CrossAttention(Attention):
    """As T5's and BART's: k and v read something else where there is something else."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q = self.q_proj(x)
        source = x if other is None else other
        k = self.k_proj(source)
        v = self.v_proj(source)
        return torch.cat([torch.tanh(q), k * v], dim=-1)


class QueryAlone(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(torch.tanh(x))


PROJECTIONS = ["q_proj", "k_proj", "v_proj"]


def stock_model(
    kind: str = "dense",
    base: type[Attention] = Attention,
    compute_dtype: torch.dtype | None = torch.float32,
    **config: Any,
) -> Any:
    torch.manual_seed(0)
    attention: nn.Module = base()
    if kind == "nf4":
        attention = quantised(attention, compute_dtype)
    options = {"r": 5, "lora_alpha": 8, "init_lora_weights": False, **config}
    return get_peft_model(attention, LoraConfig(target_modules=PROJECTIONS, **options))


def layer_of(model: Any, name: str) -> Any:
    return next(module for path, module in model.named_modules() if path.endswith(name))
