"""A gated MLP in the torch backend: what lies between its products with x, some rows at a time.

    forward    gate and up of all rows; of some: h = act(gate) ⊙ up, Sd = drop(h) Adᵀ, y
    backward   of some: dH = dY Wd + drop'(dSd Ad), then dup = dH ⊙ act(gate) and
               dgate = dH ⊙ up ⊙ act'(gate), dX, and parts of the factors' gradients

On a CPU new memory costs the kernel's time, page by page, more than what is computed in it, and
what is in the cache is read again at no cost. So only gate and up are ever there as a whole. All
rows are computed at once on other devices, and if a weight is NF4, which is decoded for each
product with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..factors import Factors, Gradients, Needs, needs_of_all
from ..gated import Activation, GatedGradients, GatedLinears, GatedNeeds, GatedSaved
from ..nf4 import NF4Weight
from . import torch_low_rank as low_rank
from .protocol import columns_of, ranks_of, shaped_as
from .torch_dropout import Dropout, dropout_mask
from .torch_gated import activated, activation_gradient, halves, outputs
from .torch_layer import adapted, dense, rows_of, stacked, without_autocast
from .torch_low_rank import given
from .torch_products import add_product, product_dtypes, rows_product, wide_dtype

# Rows at a time on a CPU: at least so many, and a part of H, since products read the whole weight
# for every few rows.
_ROWS, _PART_OF_H = 256, 4


def gated_forward(
    backend: Any, x: Tensor | None, linears: GatedLinears, activation: Activation, needs: GatedNeeds
) -> tuple[Tensor, GatedSaved]:
    """:meth:`lora_fast.backends.protocol.Backend.gated_forward` of the torch backend."""
    found, S = outputs(backend, x, linears, needs)
    saved = GatedSaved(*found, S) if needs.down.x else GatedSaved()
    like, up = halves(*found)
    gate, up, f = rows_of(like, like.dtype), rows_of(up, up.dtype), linears.down
    work, narrow = product_dtypes(gate)
    M, width = gate.shape
    Sd = None if f is None or f.A is None else gate.new_empty(M, f.A.shape[0])
    y = gate.new_empty(M, width if f is None else f.weight.shape[0])
    with without_autocast(gate):
        W = None if f is None else dense(f.weight, y.dtype).to(work)
        dropout = None if f is None else _drawn(f, M, gate)
        for some in _blocks(gate, y.shape[1], linears):
            h = activated(gate[some].to(work), activation).mul_(up[some])
            if f is None or W is None:
                y[some] = h
                continue
            S = None
            if f.A is not None:
                S = low_rank.shrink(h.to(narrow), f.A, _of(dropout, some))
                given(Sd)[some] = S
            y[some] = adapted(h, W, S, f, f.bias)
    return shaped_as(like, y), saved._replace(Sd=Sd if needs.down.B else None)


def gated_backward(
    dY: Tensor,
    x: Tensor | None,
    saved: GatedSaved,
    linears: GatedLinears,
    activation: Activation,
    needs: GatedNeeds,
) -> GatedGradients:
    """:meth:`lora_fast.backends.protocol.Backend.gated_backward` of the torch backend."""
    gate, up, dY_rows = (rows_of(t, t.dtype) for t in (*halves(given(saved.gate), saved.up), dY))
    x = None if x is None else rows_of(x, x.dtype)
    blocks = _blocks(gate, dY_rows.shape[1], linears)
    keeps = len(blocks) > 1
    places = [i for i in (0, 1) if isinstance(linears[i], Factors)]
    before = _Layers(linears.read_x, [needs[i] for i in places], saved.S, dY_rows, keeps)
    down = None
    if linears.down is not None:
        down = _Layers([linears.down], [needs.down], saved.Sd, dY_rows, keeps)
    work, dX = product_dtypes(dY_rows)[0], None
    memory = gate.new_empty(2 * blocks[0].stop * gate.shape[1], dtype=work)
    # Where they were computed elsewhere, their gradients are results.
    results = {i: torch.empty_like(gate) for i in (0, 1) if i not in places and needs[i].x}
    with without_autocast(dY):
        for some in blocks:
            wide_gate, wide_up = gate[some].to(work), up[some].to(work)
            acted, dH = activated(wide_gate, activation), dY_rows[some].to(work)
            if down is not None:
                dH = given(down.add(some, [dH], acted * wide_up if needs.down.A else None))
            both, *pair = _halves_in(memory, gate[some].shape, fused=linears.is_fused)
            torch.mul(dH, acted, out=pair[1])
            activation_gradient(dH * wide_up, wide_gate, activation, out=pair[0])
            for i, whole in results.items():
                whole[some] = pair[i]
            dYs = [both] if linears.is_fused else [pair[i] for i in places]
            part = before.add(some, dYs, None if x is None else x[some])
            if part is not None:
                dX = dY.new_empty(gate.shape[0], part.shape[1]) if dX is None else dX
                dX[some] = part
    lead = dY.shape[:-1]
    found = [Gradients(x=_shaped(results.get(i), lead)) for i in (0, 1)]
    for i, grads in zip(places, before.gradients(), strict=True):
        found[i] = grads
    of_down = Gradients() if down is None else down.gradients()[0]
    return GatedGradients(_shaped(dX, lead), found[0], found[1], of_down)


class _Layers:
    """Layers that read the same input, of whose gradients some rows are computed at a time."""

    def __init__(
        self,
        fs: Sequence[Factors],
        needs: Sequence[Needs],
        S: Tensor | None,
        dY: Tensor,
        keeps_weights: bool,
    ) -> None:
        self._fs, self._needs, self._need = fs, needs, needs_of_all(needs)
        self._dtype, (self._work, self._narrow) = dY.dtype, product_dtypes(dY)
        self._ranked = [f for f in fs if f.A is not None]
        self._A = stacked(self._ranked, self._narrow)[0] if self._ranked else None
        columns = iter(columns_of(S, self._ranked))
        self._S = [next(columns) if f.A is not None else None for f in fs]
        self._dropout = None
        if self._ranked and self._need.saves_mask:
            self._dropout = _drawn(self._ranked[0], dY.shape[0], dY)
        self._keeps_weights, self._weights = keeps_weights, dict[int, Tensor]()
        self._sums: list[dict[str, Tensor]] = [{} for _ in fs]
        self._dA: Tensor | None = None

    def add(self, some: slice, dYs: Sequence[Tensor], x: Tensor | None) -> Tensor | None:
        """The gradient of the input for some rows of dY [M, N] of every layer and of the input. The
        parts of the factors' gradients are added up."""
        narrows = [dY.to(self._narrow) for dY in dYs]
        for i, (f, need, dY) in enumerate(zip(self._fs, self._needs, narrows, strict=True)):
            S = self._S[i]
            if need.bias and f.bias is not None:
                self._sum(i, "bias", dY.sum(0, dtype=wide_dtype(dY.dtype)))
            if need.B and S is not None:
                self._sum(i, "B", rows_product(dY, S[some].to(self._narrow)))
        need, dX = self._need, None
        if self._A is not None and (need.A or need.x):
            dropout = _of(self._dropout, some)
            ranked = [(dY, f) for dY, f in zip(narrows, self._fs, strict=True) if f.A is not None]
            parts = [low_rank.shrunk_gradient(dY, f) for dY, f in ranked]
            dS = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            if need.A:
                dA = low_rank.factor_gradient(dS, given(x).to(self._narrow), dropout)
                self._dA = dA if self._dA is None else self._dA.add_(dA)
            if need.x:
                dX = low_rank.input_gradient(dS, self._A, dropout).to(self._work)
        if not need.x:
            return None
        for i, dY in enumerate(dYs):
            dX = add_product(dX, dY, self._weight(i))
        return dX

    def gradients(self) -> list[Gradients]:
        """Those of the factors of every layer, each in its dtype."""
        rows = [None] * len(self._ranked)
        dAs = iter(rows if self._dA is None else self._dA.split(ranks_of(self._ranked)))
        found = []
        for f, need, sums in zip(self._fs, self._needs, self._sums, strict=True):
            grads = {}
            if "bias" in sums:
                grads["bias"] = sums["bias"].to(given(f.bias).dtype)
            if "B" in sums:
                grads["B"] = sums["B"].mul_(f.constants.scaling).to(given(f.B).dtype)
            dA = next(dAs) if f.A is not None else None
            if need.A and dA is not None:
                grads["A"] = dA.to(given(f.A).dtype)
            found.append(Gradients(**grads))
        return found

    def _weight(self, i: int) -> Tensor:
        if i in self._weights:
            return self._weights[i]
        W = dense(self._fs[i].weight, self._dtype).to(self._work)
        if self._keeps_weights:
            self._weights[i] = W
        return W

    def _sum(self, i: int, name: str, part: Tensor) -> None:
        sums = self._sums[i]
        sums[name] = sums[name].add_(part) if name in sums else part


def _blocks(gate: Tensor, N: int, linears: GatedLinears) -> list[slice]:
    """Rows that are computed at a time: some on a CPU, all elsewhere and beside NF4 weights."""
    M = gate.shape[0]
    packed = any(isinstance(f, Factors) and isinstance(f.weight, NF4Weight) for f in linears)
    step = M if packed or gate.device.type != "cpu" else max(_ROWS, N // _PART_OF_H)
    return [slice(start, min(start + step, M)) for start in range(0, M, max(1, step))] or [slice(0)]


def _halves_in(memory: Tensor, shape: Sequence[int], *, fused: bool) -> tuple[Tensor, ...]:
    """Memory for dgate and dup [rows, I], after both in one [rows, 2I] if the layers are fused."""
    rows, width = shape
    memory = memory[: 2 * rows * width]
    if fused:
        both = memory.view(rows, 2 * width)
        return both, *both.chunk(2, dim=1)
    return memory, *memory.view(2, rows, width).unbind(0)


def _shaped(rows: Tensor | None, lead: Sequence[int]) -> Tensor | None:
    return None if rows is None else rows.view(*lead, rows.shape[-1])


def _drawn(f: Factors, M: int, like: Tensor) -> Dropout | None:
    """The dropout of the input [M, K] of a layer."""
    p, seed = f.constants.dropout_p, f.constants.dropout_seed
    if f.A is None or p == 0.0:
        return None
    return Dropout(dropout_mask(seed, M, f.A.shape[1], p, like.device), p)


def _of(dropout: Dropout | None, some: slice) -> Dropout | None:
    return None if dropout is None else Dropout(dropout.mask[some], dropout.p)
