"""The torch backend: forward and backward of the equation in as few aten calls as possible.

    forward    y = g ⊙ (x Wᵀ + s · b ⊙ ((d ⊙ S) Bᵀ)) + bias         S = drop(x) Aᵀ
    backward   dX = dY (g ⊙ W) + drop'(dS A)      dg = Σ_M dY ⊙ V      dW = g ⊙ (dYᵀ x)
               and dS, dA, dB, db, dd, dbias of torch_low_rank.py

In 16 bits the low-rank part of y and dX is computed first and the product with W added to it, in
one sum that is rounded once: in the other order the large product would be rounded twice.
torch_products.py determines the dtype of products, and by which library they are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..factors import Factors, Gradients, Needs, Saved, needs_of_all
from ..gated import Activation, GatedGradients, GatedLinears, GatedNeeds, GatedSaved
from ..nf4 import NF4Weight
from . import torch_gated_rows, torch_opaque
from . import torch_low_rank as low_rank
from .protocol import columns_of, ranks_of, shaped_as
from .torch_dropout import Dropout, dropout_mask
from .torch_layer import adapted, dense, rows_of, stacked, without_autocast
from .torch_low_rank import given
from .torch_products import (
    add_product,
    product_dtypes,
    rows_product,
    wide_dtype,
)

# Elements of V widened at a time on a CPU, few enough to stay in the cache.
_BLOCK_ELEMENTS = 1 << 18
# Elements of the widened rows of a weight that update_weight holds at a time: 16 MiB in float32.
_UPDATE_ELEMENTS = 1 << 22


class TorchBackend:
    """:class:`lora_fast.backends.protocol.Backend` in aten calls."""

    name = "torch"
    copies_input = True

    def forward(
        self, x: Tensor, fs: Sequence[Factors], needs: Sequence[Needs]
    ) -> tuple[list[Tensor], Saved]:
        f, need = fs[0], needs[0] if len(needs) == 1 else needs_of_all(needs)
        dtype, (work, narrow) = x.dtype, product_dtypes(x)
        with without_autocast(x):
            rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
            rows = rows if work is dtype else rows.to(work)
            S = V = dropout = None
            columns: Sequence[Tensor | None] = [None]
            if f.A is not None:
                if f.constants.dropout_p > 0.0:
                    dropout = _drawn(f, rows.shape[0], rows.device)
                A, ranks = (f.A, None) if len(fs) == 1 else stacked(fs, narrow)
                x_narrow = rows if narrow is work else rows.to(narrow)
                S = low_rank.shrink(x_narrow, A, dropout, f.constants.rank_spans)
                columns = [S] if ranks is None else S.split(ranks, dim=1)
            ys = []
            for f, S_i in zip(fs, columns, strict=True):
                W = dense(f.weight, dtype)
                W = W if work is dtype else W.to(work)
                if f.g is None:
                    y = adapted(rows, W, S_i, f, f.bias)
                else:
                    y, V = _gained(rows, W, S_i, f)
                del W  # before the next one is decoded
                ys.append(shaped_as(x, y if work is dtype else y.to(dtype)))
        # A Tensor.to that has nothing to do takes the time of a small product.
        S = S if S is None or S.dtype is dtype else S.to(dtype)
        V = V if V is None or V.dtype is dtype else V.to(dtype)
        return ys, Saved(
            S if need.saves_S else None,
            V if V is not None and need.saves_V else None,
        )

    def backward(
        self,
        dYs: Sequence[Tensor],
        x: Tensor | None,
        saved: Saved,
        fs: Sequence[Factors],
        needs: Sequence[Needs],
    ) -> list[Gradients]:
        f, need, shape = fs[0], needs[0] if len(fs) == 1 else needs_of_all(needs), dYs[0].shape
        dtype, (work, narrow) = dYs[0].dtype, product_dtypes(dYs[0])
        with without_autocast(dYs[0]):
            dYs = [rows_of(dY, work) for dY in dYs]
            narrows = dYs if narrow is work else [dY.to(narrow) for dY in dYs]
            dS = dropout = None
            if f.A is not None and need.reads_mask:
                if f.constants.dropout_p > 0.0:
                    dropout = _drawn(f, narrows[0].shape[0], dYs[0].device)
                parts = list(map(low_rank.shrunk_gradient, narrows, fs))
                dS = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            S = columns_of(saved.S, fs)
            found = list(map(low_rank.output_gradients, narrows, S, fs, needs))
            first = found[0]
            if x is not None and need.A:
                of_A = given(f.A).dtype if len(fs) == 1 else None
                dA = low_rank.factor_gradient(given(dS), rows_of(x, narrow), dropout, of_A)
                _set_gradients_of_A(found, dA, fs, needs)
            if x is not None and need.weight:
                dW = low_rank.times_gain(rows_product(dYs[0], rows_of(x, work)), f)
                first["weight"] = dW.to(f.weight.dtype)
            if need.x:
                dX = self._input_gradient(dYs, dS, fs, dropout, dtype, narrow)
                dX = dX if work is dtype else dX.to(dtype)
                first["x"] = dX if len(shape) == 2 else dX.view(*shape[:-1], dX.shape[-1])
            if need.g:
                first["g"] = _gain_gradient(dYs[0], given(saved.V)).to(given(f.g).dtype)
        return [Gradients(**gradients) for gradients in found]

    def add_low_rank(
        self, y: Tensor | None, x: Tensor, f: Factors, needs: Needs, *, in_place: bool
    ) -> tuple[Tensor, Saved]:
        with without_autocast(x):
            return torch_opaque.add_low_rank(y, x, f, needs, in_place=in_place)

    def low_rank_gradients(
        self, dY: Tensor, x: Tensor | None, saved: Saved, f: Factors, needs: Needs
    ) -> Gradients:
        with without_autocast(dY):
            return torch_opaque.low_rank_gradients(dY, x, saved, f, needs)

    def gated_forward(
        self, x: Tensor | None, linears: GatedLinears, activation: Activation, needs: GatedNeeds
    ) -> tuple[Tensor, GatedSaved]:
        return torch_gated_rows.gated_forward(x, linears, activation, needs)

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
        return torch_gated_rows.gated_backward(dY, x, saved, linears, activation, needs)

    def dropout_mask(
        self, seed: int | Tensor, M: int, K: int, p: float, device: torch.device
    ) -> Tensor:
        return dropout_mask(seed, M, K, p, device)

    def row_norms(self, weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """Without an N × K product:

        ‖W_i + s (B A)_i‖² = ‖W_i‖² + 2s (W Aᵀ)_i · B_i + s² B_i (A Aᵀ) B_iᵀ

        If B A is zero it equals the norm that m was initialised with, so g is 1 before training.
        """
        with without_autocast(A):
            W = dense(weight, torch.float32)
            lengths = torch.linalg.vector_norm(W, dim=1)
            a, b = A.float(), B.float()
            cross = torch.linalg.vecdot(W @ a.T, b)
            delta = torch.linalg.vecdot(b @ (a @ a.T), b)
            change = 2.0 * scaling * cross + scaling * scaling * delta
            # Rounding can make a row that cancels negative.
            changed = (lengths * lengths + change).clamp_(min=0.0).sqrt_()
            return torch.where(change == 0.0, lengths, changed)

    @torch.no_grad()
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
        wide = wide_dtype(W.dtype)
        A = None if A is None else A.to(wide)
        step = max(1, _UPDATE_ELEMENTS // max(1, W.shape[1]))
        # A few rows at a time.
        for start in range(0, W.shape[0], step):
            rows = slice(start, start + step)
            total = W[rows].to(wide, copy=True)
            if A is not None and B is not None:
                left = B[rows].to(wide)
                left = left if d is None else left * d
                left = left if b is None else left * b[rows].unsqueeze(1)
                # The product alone first: adding −Δ then removes exactly what Δ added.
                total.add_(left @ A, alpha=scaling)
            if g is not None:
                total.mul_(g[rows].unsqueeze(1))
            out[rows].copy_(total)

    def _input_gradient(
        self,
        dYs: Sequence[Tensor],
        dS: Tensor | None,
        fs: Sequence[Factors],
        dropout: Dropout | None,
        dtype: torch.dtype,
        narrow: torch.dtype,
    ) -> Tensor:
        """dX = Σ dY (g ⊙ W) + drop'(dS A)."""
        work, dX = dYs[0].dtype, None
        if dS is not None:
            dX = low_rank.input_gradient(dS, stacked(fs, narrow)[0], dropout)
            dX = dX if narrow is work else dX.to(work)
        for dY, f in zip(dYs, fs, strict=True):
            W = dense(f.weight, dtype)
            W = W if work is dtype else W.to(work)
            if f.g is not None:
                # g multiplies the smaller one of dY [M, N] and W [N, K].
                if dY.shape[0] < W.shape[1]:
                    dY = _times(dY, f.g)
                else:
                    W = _times(W, f.g.unsqueeze(1))
            dX = add_product(dX, dY, W)
            del W
        return given(dX)


TORCH = TorchBackend()


def _drawn(f: Factors, M: int, device: torch.device) -> Dropout:
    """The dropout of x [M, K], the same in forward and backward."""
    p, seed, K = f.constants.dropout_p, f.constants.dropout_seed, given(f.A).shape[1]
    return Dropout(dropout_mask(seed, M, K, p, device), p)


def _gained(rows: Tensor, W: Tensor, S: Tensor | None, f: Factors) -> tuple[Tensor, Tensor]:
    """y = g ⊙ V + bias, and V."""
    g, bias = given(f.g), f.bias
    if rows.dtype.itemsize > 2:
        y, g = adapted(rows, W, S, f, bias), g.to(rows.dtype)
        if bias is None:
            return y * g, y
        V = y - bias
        # By g − 1, so that a gain of 1 gives the same bits as no gain.
        return torch.addcmul(y, V, g - 1.0), V
    # In 16 bits V would be lost beside a large bias.
    V = adapted(rows, W, S, f, None)
    return _times(V, g, bias), V


def _gain_gradient(dY: Tensor, V: Tensor) -> Tensor:
    """dg = Σ_M dY ⊙ V, not below float32."""
    wide = wide_dtype(dY.dtype)
    total = dY.new_zeros(dY.shape[1], dtype=wide)
    for rows in _blocks(dY):
        total += torch.linalg.vecdot(dY[rows].to(wide), V[rows].to(wide), dim=0)
    return total


def _times(matrix: Tensor, g: Tensor, bias: Tensor | None = None) -> Tensor:
    """g ⊙ matrix + bias for g [N] or [M, 1], rounded once; a g close to 1 is not rounded to it."""
    out = torch.empty_like(matrix)
    g = g.to(wide_dtype(matrix.dtype))
    for rows in _blocks(matrix):
        gain = g if g.dim() == 1 else g[rows]
        if bias is None:
            torch.mul(matrix[rows], gain, out=out[rows])
        else:
            torch.addcmul(bias, matrix[rows], gain, out=out[rows])
    return out


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """A few rows at a time on a CPU, all at once elsewhere."""
    M, N = matrix.shape
    step = max(1, _BLOCK_ELEMENTS // N) if matrix.device.type == "cpu" else max(1, M)
    return (slice(start, start + step) for start in range(0, M, step))


def _set_gradients_of_A(
    found: Sequence[dict[str, Tensor | None]],
    dA: Tensor,
    fs: Sequence[Factors],
    needs: Sequence[Needs],
) -> None:
    """Hand out the rows of dA [Σ R_i, K] to the layers that need them, each in its own dtype."""
    parts = [dA] if len(fs) == 1 else dA.split(ranks_of(fs))
    for gradients, part, f, need in zip(found, parts, fs, needs, strict=True):
        if need.A:
            dtype = given(f.A).dtype
            gradients["A"] = part if part.dtype is dtype else part.to(dtype)
