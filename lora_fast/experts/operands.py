"""The operands of experts: the factors of a projection, and which rows belong to which expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..factors import Constants, Factors
from .nf4_experts import NF4Experts


class Projection(NamedTuple):
    """One linear projection of E experts: y_e = x_e W_eᵀ + s · (x_e A_eᵀ) B_eᵀ + bias_e.

    weight [E, N, K], of any strides, or :class:`NF4Experts`; bias [E, N], A [E, R, K] and B
    [E, N, R] may be absent, A and B only together. A stored [E, K, N] is a transposed view.
    """

    weight: Tensor | NF4Experts
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    scaling: float = 1.0

    def by_expert(self, dtype: torch.dtype) -> ProjectionByExpert:
        return ProjectionByExpert(self, dtype)


class ProjectionByExpert:
    """The factors of one expert after the other, its weight dense in `dtype`."""

    def __init__(self, projection: Projection, dtype: torch.dtype) -> None:
        weight, bias, A, B, scaling = projection
        self._weight, self._dtype = weight, dtype
        self._dense = weight.unbind() if isinstance(weight, Tensor) else weight.by_expert(dtype)
        self._bias = None if bias is None else bias.unbind()
        self._A = None if A is None else A.unbind()
        # PEFT stores the experts' index of B last: one copy here instead of strided reads in
        # every product.
        self._B = None if B is None else B.contiguous().unbind()
        self._constants = Constants(scaling)

    def __getitem__(self, expert: int) -> Factors:
        W = self._dense[expert]
        bias = None if self._bias is None else self._bias[expert]
        A = None if self._A is None else self._A[expert]
        B = None if self._B is None else self._B[expert]
        return Factors(W, bias, A, B, constants=self._constants)


class Routing(NamedTuple):
    """The rows of a call, sorted by expert.

    order [P]: for every sorted row its place in the flattened top_k_index [T, k], P = T · k, in
    rising order within an expert · token [P] = order // k · offsets [E]: where the rows of each
    expert end. Rows beyond the last one belong to no expert; ``complete``: there are none.
    """

    order: Tensor
    token: Tensor
    offsets: Tensor
    complete: bool = False

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(expert, start, stop) of every expert with rows; on a GPU it waits for the offsets."""
        return spans(self.offsets, self.order.shape[0])


def spans(offsets: Tensor, rows: int) -> Iterator[tuple[int, int, int]]:
    """(expert, start, stop) of every expert with some of the rows, from where they end [E]. Fake
    offsets have no values: then the rows are divided evenly."""
    experts = offsets.shape[0]
    if isinstance(offsets, FakeTensor):
        stops = [rows * (expert + 1) // experts for expert in range(experts)]
    else:
        stops = offsets.tolist()
    start = 0
    for expert, stop in enumerate(stops):
        if stop > start:
            yield expert, start, stop
        start = stop


def sort_by_expert(top_k_index: Tensor, experts: int, *, complete: bool = False) -> Routing:
    """The rows of top_k_index [T, k] by expert; an index ≥ `experts` names none of them, unless it
    is known (`complete`) that there is none. Nothing waits for a GPU."""
    ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
    wanted = torch.arange(1, experts + 1, device=ids.device, dtype=ids.dtype)
    offsets = torch.searchsorted(ids, wanted, out_int32=True)
    return Routing(order, order // max(1, top_k_index.shape[-1]), offsets, complete)
