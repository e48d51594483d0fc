"""The factors of the equation, as every backend takes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .nf4 import NF4Weight


class Constants(NamedTuple):
    """The operands of the equation that are not differentiated.

    rank_spans [samples, 2] (int32): the rows of each sample, M / samples consecutive ones, use only
    columns [start, stop) of S.
    """

    scaling: float = 1.0
    dropout_p: float = 0.0
    dropout_seed: int = 0
    rank_spans: Tensor | None = None


class Factors(NamedTuple):
    """Everything of y = g ⊙ (x Wᵀ + s · b ⊙ ((d ⊙ (drop(x) Aᵀ)) Bᵀ)) + bias except x.

    weight [N, K], bias [N], A [R, K], B [N, R], b [N], d [R], g [N]; None if a factor is absent.
    The last four are those of :class:`Constants`, in their order.
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
    rank_spans: Tensor | None = None

    @property
    def has_adapter(self) -> bool:
        return self.A is not None


class Needs(NamedTuple):
    """The gradients that are required; nothing is computed or saved for the others."""

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

    @property
    def saves_mask(self) -> bool:
        return self.A or self.x


class Saved(NamedTuple):
    """Tensors saved for backward, beside x and the factors.

    S = drop(x) Aᵀ [M, R] · V = y before g and the bias [M, N] · mask [M, K] (bool) of dropout, from
    a backend for which saving it is cheaper than drawing it again.
    """

    S: Tensor | None = None
    V: Tensor | None = None
    mask: Tensor | None = None


class Gradients(NamedTuple):
    """One gradient per factor, in the factor's dtype; None if it is not required."""

    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    b: Tensor | None = None
    d: Tensor | None = None
    g: Tensor | None = None
