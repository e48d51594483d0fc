"""The factors of the equation, as every backend takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .nf4 import NF4Weight


class Constants(NamedTuple):
    """The operands of the equation that are not differentiated.

    rank_spans [samples, 2] (int32): the rows of each sample, M / samples consecutive ones, use only
    columns [start, stop) of S. dropout_seed: a number, or an int64 tensor [1] that holds it.
    """

    scaling: float = 1.0
    dropout_p: float = 0.0
    dropout_seed: int | Tensor = 0
    rank_spans: Tensor | None = None


NO_CONSTANTS = Constants()


class Factors(NamedTuple):
    """Everything of y = g ⊙ (x Wᵀ + s · b ⊙ ((d ⊙ (drop(x) Aᵀ)) Bᵀ)) + bias except x.

    weight [N, K], bias [N], A [R, K], B [N, R], b [N], d [R], g [N]; None if a factor is absent.
    """

    weight: Tensor | NF4Weight
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    b: Tensor | None = None
    d: Tensor | None = None
    g: Tensor | None = None
    constants: Constants = NO_CONSTANTS


# The weight in factors whose product with W another module computes.
NO_WEIGHT = torch.empty(0, 0)


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
    def reads_mask(self) -> bool:
        """Whether the backward pass draws dropout's mask again."""
        return self.A or self.x


def needs_of_all(needs: Sequence[Needs]) -> Needs:
    """The gradients that any layer of a group requires."""
    return Needs(*map(any, zip(*needs, strict=True)))


class Saved(NamedTuple):
    """Tensors saved for backward, beside x and the factors.

    S = drop(x) Aᵀ [M, R], of a group side by side [M, Σ R_i] · V = y before g and the bias [M, N].
    """

    S: Tensor | None = None
    V: Tensor | None = None


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


def saved_input(x: Tensor, constants: Constants, needs: Needs, *, copies: bool) -> Tensor | None:
    """x as the gradients of A and W read it, None if neither trains.

    PEFT's layers save drop(x), or the rows of an adapter's samples, so x may be changed in place
    afterwards; where they save x itself, autograd raises. A backend that `copies` saves a copy in
    these cases. The kernels share x with the model, as without dropout: a copy would cost a pass
    over x and M × K elements per layer. Autograd raises if x was changed.
    """
    if not (needs.A or needs.weight):
        return None
    owned = constants.dropout_p > 0.0 or constants.rank_spans is not None
    return x.clone() if copies and owned and not needs.weight else x
