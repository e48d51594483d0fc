"""The factors of the equation, as every backend takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .nf4 import NF4Weight


@dataclass(frozen=True, eq=False)
class Factors:
    """Everything of y = g ⊙ (x Wᵀ + s · b ⊙ ((d ⊙ (drop(x) Aᵀ)) Bᵀ)) + bias except x.

    weight [N, K], bias [N], A [R, K], B [N, R], b [N], d [R], g [N]; None where a factor is absent.
    """

    weight: Tensor | NF4Weight
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    b: Tensor | None = None
    d: Tensor | None = None
    g: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0
    dropout_seed: int = 0

    @property
    def has_adapter(self) -> bool:
        return self.A is not None


class Needs(NamedTuple):
    """Which gradients are wanted; nothing is computed or saved for the others."""

    x: bool = False
    weight: bool = False
    bias: bool = False
    A: bool = False
    B: bool = False
    b: bool = False
    d: bool = False
    g: bool = False

    @property
    def saves_x(self) -> bool:
        return self.A or self.weight

    @property
    def saves_S(self) -> bool:
        return self.B or self.b or self.d

    @property
    def saves_V(self) -> bool:
        return self.g


class Gradients(NamedTuple):
    """One gradient a factor, None where it was not wanted; in the dtype of the factor."""

    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    b: Tensor | None = None
    d: Tensor | None = None
    g: Tensor | None = None
