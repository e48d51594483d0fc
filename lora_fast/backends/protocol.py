"""The contract of a backend, and helpers that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..factors import Factors, Gradients, Needs, Saved
from ..gated import Activation, GatedGradients, GatedLinears, GatedNeeds, GatedSaved
from ..nf4 import NF4Weight


class Backend(Protocol):
    """Computes the equation, a gated MLP, and other functions of the factors.

        y = g ⊙ (x Wᵀ + s · b ⊙ ((d ⊙ S) Bᵀ)) + bias          S = drop(x) Aᵀ

    `fs` and `needs` have an entry for each layer that reads x [..., K]. A single layer is a
    group of one. Layers of a larger group are plain: A, B and perhaps a bias, W frozen, no
    rank_spans, one dropout for all.

    A backend knows neither autograd nor modules. It is chosen once for a call, by
    :func:`lora_fast.backends.selection.backend_for`; the backward pass uses the backend of the
    forward pass. It computes in the dtype of x, regardless of autocast, and rounds the sum of a
    product only at the end.
    """

    name: str
    """"torch" or "triton"."""
    copies_input: bool
    """Whether a copy of x is saved with dropout or rank_spans, where PEFT saves its own tensor."""

    def forward(
        self, x: Tensor, fs: Sequence[Factors], needs: Sequence[Needs]
    ) -> tuple[list[Tensor], Saved]:
        """y [..., N] of every layer for x [..., K], and what the backward pass needs."""

    def backward(
        self,
        dYs: Sequence[Tensor],
        x: Tensor | None,
        saved: Saved,
        fs: Sequence[Factors],
        needs: Sequence[Needs],
    ) -> list[Gradients]:
        """The gradients that `needs` names, for dY [..., N] of every layer.

        x [..., K] is None if neither A nor W trains; `saved` comes from forward, by any plan.
        dX [..., K] is one sum, returned with the first layer.
        """

    def add_low_rank(
        self, y: Tensor | None, x: Tensor, f: Factors, needs: Needs, *, in_place: bool
    ) -> tuple[Tensor, Saved]:
        """y + s · b ⊙ ((d ⊙ S) Bᵀ) + bias [..., N], in the memory of y if `in_place`, and S where
        it is needed; without y that part alone, in the dtype of x [..., K].

        The weight of f is not read, and there is no g. In place, y is contiguous.
        """

    def low_rank_gradients(
        self, dY: Tensor, x: Tensor | None, saved: Saved, f: Factors, needs: Needs
    ) -> Gradients:
        """The gradients of :meth:`add_low_rank` that `needs` names, for dY [..., N] in the dtype of
        x; dX is drop'(dS A). x [..., K] is None if A does not train."""

    def gated_forward(
        self, x: Tensor | None, linears: GatedLinears, activation: Activation, needs: GatedNeeds
    ) -> tuple[Tensor, GatedSaved]:
        """y [..., N], or h [..., I] without down, and what the backward pass needs.

        x [..., K] is None if gate and up were computed elsewhere. Without a gradient before h none
        of down is required either, and nothing is saved. Dropout as in forward, with the seed of
        each layer; down's mask is that of h.
        """

    def gated_backward(
        self,
        dY: Tensor,
        x: Tensor | None,
        saved: GatedSaved,
        linears: GatedLinears,
        activation: Activation,
        needs: GatedNeeds,
        *,
        in_place: bool,
    ) -> GatedGradients:
        """The gradients that `needs` names, for dY [..., N], or [..., I] without down.

        x is None if the A of neither gate nor up trains. With `in_place` nobody reads the saved
        gate and up again: their memory may hold their gradients, except that of outputs which were
        computed elsewhere.
        """

    def dropout_mask(
        self, seed: int | Tensor, M: int, K: int, p: float, device: torch.device
    ) -> Tensor:
        """The boolean keep-mask [M, K]: a pure function of its arguments.

        A seed in a tensor [1] gives the mask of the number in it, except that the torch backend has
        another one while a CUDA graph is captured."""

    def row_norms(self, weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """‖W_i + s (B A)_i‖₂ [N] of every row i, in float32."""

    def update_weight(
        self,
        W: Tensor,
        out: Tensor,
        *,
        A: Tensor | None = None,
        B: Tensor | None = None,
        b: Tensor | None = None,
        d: Tensor | None = None,
        g: Tensor | None = None,
        scaling: float = 1.0,
    ) -> None:
        """out ← round(g ⊙ (W + s · (b ⊙ (B d)) A)) for dense W and out [N, K]; out may be W itself.

        Products and sums in float32, in float64 where W is float64; one rounding to out's dtype.
        """


def shaped_as(x: Tensor, y: Tensor) -> Tensor:
    """y [M, N] as [..., N] for x [..., K]; not a view to autograd, so callers may write to it."""
    if x.dim() == 2:
        return y
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def columns_of(S: Tensor | None, fs: Sequence[Factors]) -> Sequence[Tensor | None]:
    """The S [M, R_i] of every layer, side by side in S [M, Σ R_i]."""
    if S is None or len(fs) == 1:
        return [S] * len(fs)
    return S.split(ranks_of(fs), dim=1)


def ranks_of(fs: Sequence[Factors]) -> list[int]:
    """R_i of every layer; 0 without A."""
    return [0 if f.A is None else f.A.shape[0] for f in fs]
