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
from .torch_gated import activated, activation_gradient, halves
from .torch_layer import adapted, dense, rows_of, stacked, without_autocast
from .torch_low_rank import given
from .torch_products import add_product, linear, product_dtypes, rows_product, wide_dtype

# Rows at a time on a CPU: at least so many, and a part of H, since products read the whole weight
# for every few rows.
_ROWS, _PART_OF_H = 1024, 4


def gated_forward(
    x: Tensor | None, linears: GatedLinears, activation: Activation, needs: GatedNeeds
) -> tuple[Tensor, GatedSaved]:
    """:meth:`lora_fast.backends.protocol.Backend.gated_forward` of the torch backend."""
    found, S = _gate_and_up(x, linears)
    like, up = halves(*found)
    gate, up, f = rows_of(like, like.dtype), rows_of(up, up.dtype), linears.down
    work, narrow = product_dtypes(gate)
    (M, width), dtype = gate.shape, gate.dtype
    # Without a product h is the output, computed in its memory.
    is_output = f is None and work is dtype
    y = gate.new_empty(M, width) if is_output else None
    Sd = None
    with without_autocast(gate):
        product = None if f is None else _Product(f, M, dtype, work)
        dropout = None if f is None else _drawn(f, M, gate)
        for some in _blocks(gate, width if f is None else f.weight.shape[0], linears):
            wide_gate = _of(gate, some).to(work)
            if is_output:
                activated(wide_gate, activation, _of(given(y), some)).mul_(_of(up, some))
                continue
            memory = None if product is None else product.memory_beside_S(wide_gate.shape[0])
            h = activated(wide_gate, activation, memory).mul_(_of(up, some))
            if f is not None and product is not None:
                S_some = None
                if f.A is not None:
                    S_some = low_rank.shrink(h.to(narrow), f.A, _dropped(dropout, some))
                    Sd = _with(Sd, some, S_some, M, dtype)
                h = product(h, S_some)
            y = _with(y, some, h, M, dtype)
    y = shaped_as(like, given(y))
    if not needs.down.x:
        return y, GatedSaved()
    S = S if needs.gate.B or needs.up.B else None
    return y, GatedSaved(*found, S, Sd if needs.down.B else None)


def _gate_and_up(
    x: Tensor | None, linears: GatedLinears
) -> tuple[tuple[Tensor, Tensor | None], Tensor | None]:
    """gate and up, or both in one and None; and the S of those that have an A, side by side."""
    found: list[Any] = list(linears[:2])
    if x is None:
        return (found[0], found[1]), None
    dtype, ranked = x.dtype, [f for f in linears.read_x if f.A is not None]
    work, narrow = product_dtypes(x)
    S, columns = None, iter(())
    with without_autocast(x):
        rows = rows_of(x, work)
        if ranked:
            A, ranks = stacked(ranked, narrow)
            S = low_rank.shrink(rows.to(narrow), A, _drawn(ranked[0], rows.shape[0], x))
            columns = iter(S.split(ranks, dim=1))
        for i, f in enumerate(found):
            if isinstance(f, Factors):
                part = None if f.A is None else next(columns)
                y = _Product(f, rows.shape[0], dtype, work)(rows, part)
                found[i] = shaped_as(x, y.to(dtype))
    return (found[0], found[1]), None if S is None else S.to(dtype)


class _Product:
    """x Wᵀ + s · S Bᵀ + bias for rows of x [M, K]. In 16 bits, for many rows, it is one product,
    [x | S] [W | s·B]ᵀ + bias, which is worth a copy of W; else one on top of the other."""

    def __init__(self, f: Factors, M: int, dtype: torch.dtype, work: torch.dtype) -> None:
        self._f, self._W = f, dense(f.weight, dtype).to(work)
        self._K = self._W.shape[1]
        self._is_one = f.B is not None and work.itemsize == 2 and self._K <= M
        self._wide: Tensor | None = None
        if self._is_one:
            Q = low_rank.expand_factor(f, work) * f.constants.scaling
            self._W = torch.cat([self._W, Q], dim=1)
            self._bias = None if f.bias is None else f.bias.to(work)

    def memory_beside_S(self, rows: int) -> Tensor | None:
        """Memory [rows, K] of the x that is given next, or None: then no more of it is needed."""
        if not self._is_one:
            return None
        if self._wide is None:
            self._wide = self._W.new_empty(rows, self._W.shape[1])
        return self._wide[:rows, : self._K]

    def __call__(self, rows: Tensor, S: Tensor | None) -> Tensor:
        if not self._is_one:
            return adapted(rows, self._W, S, self._f, self._f.bias)
        if self._wide is None:
            wide = torch.cat([rows, given(S).to(rows.dtype)], dim=1)
        else:
            wide = self._wide[: rows.shape[0]]
            wide[:, self._K :] = given(S)
        return linear(wide, self._W, self._bias)


def gated_backward(
    dY: Tensor,
    x: Tensor | None,
    saved: GatedSaved,
    linears: GatedLinears,
    activation: Activation,
    needs: GatedNeeds,
) -> GatedGradients:
    """:meth:`lora_fast.backends.protocol.Backend.gated_backward` of the torch backend."""
    gate, up, rows = (rows_of(t, t.dtype) for t in (*halves(given(saved.gate), saved.up), dY))
    blocks, work = _blocks(gate, rows.shape[1], linears), product_dtypes(rows)[0]
    places = [i for i in (0, 1) if isinstance(linears[i], Factors)]
    # Memory of some rows, which those after them use again; fused layers want both side by side.
    most, both = _of(gate, blocks[0]).shape, None
    memory = [gate.new_empty(most, dtype=work) for _ in range(2)]
    if linears.is_fused:
        both = gate.new_empty(most[0], 2 * most[1], dtype=work)
    # Where they were computed elsewhere, their gradients are results.
    results: dict[int, Tensor | None] = {i: None for i in (0, 1) if i not in places and needs[i].x}
    direct = {i: gate.new_empty(gate.shape) for i in results if work is gate.dtype}
    results = {**results, **direct}
    with without_autocast(dY):
        before = _Before(linears.read_x, [needs[i] for i in places], saved.S, rows, len(blocks) > 1)
        down = None
        if linears.down is not None:
            down = _Down(linears.down, needs.down, saved.Sd, rows, len(blocks) > 1)
        for some in blocks:
            wide_gate, wide_up = _of(gate, some).to(work), _of(up, some).to(work)
            acted, h = (_first(t, wide_gate.shape[0]) for t in memory)
            acted = activated(wide_gate, activation, acted)
            if down is None:
                dH, unread = _of(rows, some).to(work), h
            else:
                dH = down.add(some, torch.mul(acted, wide_up, out=h) if needs.down.A else None)
                unread = dH
            # In the memory of results, of what is not read again, or side by side.
            joined = None if both is None else _first(both, dH.shape[0])
            pair = [unread, acted] if joined is None else list(joined.chunk(2, dim=1))
            for i, whole in direct.items():
                pair[i] = _of(whole, some)
            torch.mul(dH, acted, out=pair[1])
            dActed = torch.mul(dH, wide_up, out=pair[0])
            activation_gradient(dActed, wide_gate, activation, out=pair[0])
            for i in results.keys() - direct.keys():
                results[i] = _with(results[i], some, pair[i], gate.shape[0], gate.dtype)
            before.add(some, [pair[i] for i in places] if joined is None else [joined])
        of_read_x = before.gradients(None if x is None else rows_of(x, x.dtype))
    lead = dY.shape[:-1]
    found = [Gradients(x=_shaped(results.get(i), lead)) for i in (0, 1)]
    for i, grads in zip(places, of_read_x, strict=True):
        found[i] = grads
    of_down = Gradients() if down is None else down.gradients
    return GatedGradients(_shaped(before.dX, lead), found[0], found[1], of_down)


class _Weights:
    """The weights of layers as their input gradients read them, above the rows of `below`; kept if
    several blocks do."""

    def __init__(
        self,
        fs: Sequence[Factors],
        dtype: torch.dtype,
        work: torch.dtype,
        keeps: bool,
        below: Tensor | None = None,
    ) -> None:
        self._fs, self._dtype, self._work, self._below = fs, dtype, work, below
        self._kept: dict[int, Tensor] | None = {} if keeps else None

    def __getitem__(self, i: int) -> Tensor:
        if self._kept is None:
            return self._of(i)
        if i not in self._kept:
            self._kept[i] = self._of(i)
        return self._kept[i]

    def _of(self, i: int) -> Tensor:
        W = dense(self._fs[i].weight, self._dtype).to(self._work)
        return W if self._below is None else torch.cat([W, self._below])


class _Down:
    """The layer that reads h: its gradients, of which those of h and A come some rows at a time.

    Without dropout dH is one product, [dY | dS] [W; A], where y is.
    """

    def __init__(
        self, f: Factors, need: Needs, Sd: Tensor | None, dY: Tensor, keeps_weights: bool
    ) -> None:
        work, self._narrow = product_dtypes(dY)
        (M, N), narrow = dY.shape, dY.to(self._narrow)
        self._A, self._dY, below = f.A, dY.to(work), None
        self._of_output = low_rank.output_gradients(narrow, Sd, f, need)
        self._dropout = _drawn(f, M, dY)
        self._dS: Tensor | None = None
        self._dA: Tensor | None = None
        if f.A is not None:
            self._dS = low_rank.shrunk_gradient(narrow, f)
            if self._dropout is None and self._dS.dtype is work and work.itemsize == 2 and N <= M:
                self._dY, below = torch.cat([self._dY, self._dS], dim=1), f.A.to(work)
        self._is_one = below is not None
        self._dH: Tensor | None = None
        self._W = _Weights([f], dY.dtype, work, keeps_weights, below)

    def add(self, some: slice | None, h: Tensor | None) -> Tensor:
        """dH of some rows, in memory that the next ones take, whose part of dA is added; `h` if A
        trains."""
        dropout, dH = _dropped(self._dropout, some), None
        if self._dS is not None:
            dS = _of(self._dS, some)
            if not self._is_one:
                A = given(self._A).to(self._narrow)
                dH = low_rank.input_gradient(dS, A, dropout).to(self._dY.dtype)
            if h is not None:
                dA = low_rank.factor_gradient(dS, h.to(self._narrow), dropout)
                self._dA = dA if self._dA is None else self._dA.add_(dA)
        dY, W = _of(self._dY, some), self._W[0]
        if not self._is_one:
            return add_product(dH, dY, W)
        if self._dH is None:
            self._dH = dY.new_empty(dY.shape[0], W.shape[1])
        return torch.mm(dY, W, out=_first(self._dH, dY.shape[0]))

    @property
    def gradients(self) -> Gradients:
        """Those of the factors, after all rows."""
        dA = None if self._dA is None else self._dA.to(given(self._A).dtype)
        return Gradients(**self._of_output, A=dA)


class _Before:
    """The layers that read x: their gradients, for dY of some rows at a time."""

    def __init__(
        self,
        fs: Sequence[Factors],
        needs: Sequence[Needs],
        S: Tensor | None,
        dY: Tensor,
        keeps_weights: bool,
    ) -> None:
        self._fs, self._needs, self._need = fs, needs, needs_of_all(needs)
        self._work, self._narrow = product_dtypes(dY)
        self._M, self._W = dY.shape[0], _Weights(fs, dY.dtype, self._work, keeps_weights)
        self._ranked = [f for f in fs if f.A is not None]
        self._A = stacked(self._ranked, self._narrow)[0] if self._ranked else None
        columns = iter(columns_of(S, self._ranked))
        self._S = [next(columns) if f.A is not None else None for f in fs]
        self._sums: list[dict[str, Tensor]] = [{} for _ in fs]
        self._dropout: Dropout | None = None
        self._dS: Tensor | None = None
        if self._ranked and self._need.reads_mask:
            self._dropout = _drawn(self._ranked[0], self._M, dY)
        self._dtype = dY.dtype
        self.dX: Tensor | None = None

    def add(self, some: slice | None, dYs: Sequence[Tensor]) -> None:
        """Some rows of dX, and what they add to the factors' gradients, for dY of every layer."""
        narrows = [dY.to(self._narrow) for dY in dYs]
        for i, (f, need, dY) in enumerate(zip(self._fs, self._needs, narrows, strict=True)):
            S = self._S[i]
            if need.bias and f.bias is not None:
                self._sum(i, "bias", dY.sum(0, dtype=wide_dtype(dY.dtype)))
            if need.B and S is not None:
                S = _of(S, some).to(self._narrow)
                # Rows of dBᵀ are long, which is faster where that outweighs turning it round.
                dB = rows_product(S, dY).T if dY.shape[0] >= _ROWS else rows_product(dY, S)
                self._sum(i, "B", dB)
        dX = None
        if self._A is not None and self._need.reads_mask:
            dS = self._shrunk(some, narrows)
            if self._need.x:
                dropout = _dropped(self._dropout, some)
                dX = low_rank.input_gradient(dS, self._A, dropout).to(self._work)
        if self._need.x and dYs:
            for i, dY in enumerate(dYs):
                dX = add_product(dX, dY, self._W[i])
            self.dX = _with(self.dX, some, given(dX), self._M, self._dtype)

    def gradients(self, x: Tensor | None) -> list[Gradients]:
        """Those of the factors of every layer, each in its dtype, after all rows."""
        dAs: Any = [None] * len(self._ranked)
        if x is not None and self._need.A and self._dS is not None:
            of_all = low_rank.factor_gradient(self._dS, x.to(self._narrow), self._dropout)
            dAs = of_all.split(ranks_of(self._ranked))
        remaining, found = iter(dAs), []
        for f, need, sums in zip(self._fs, self._needs, self._sums, strict=True):
            dA = next(remaining) if f.A is not None else None
            bias, dB = sums.get("bias"), sums.get("B")
            found.append(
                Gradients(
                    bias=None if bias is None else bias.to(given(f.bias).dtype),
                    A=dA.to(given(f.A).dtype) if need.A and dA is not None else None,
                    B=None if dB is None else _scaled(dB, f),
                )
            )
        return found

    def _shrunk(self, some: slice | None, dYs: Sequence[Tensor]) -> Tensor:
        """dS of some rows [rows, Σ R], which is kept for dA."""
        ranked = [(dY, f) for dY, f in zip(dYs, self._fs, strict=True) if f.A is not None]
        parts = [low_rank.shrunk_gradient(dY, f) for dY, f in ranked]
        dS = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self._need.A:
            self._dS = _with(self._dS, some, dS, self._M, dS.dtype)
        return dS

    def _sum(self, i: int, name: str, part: Tensor) -> None:
        sums = self._sums[i]
        sums[name] = sums[name].add_(part) if name in sums else part


def _blocks(gate: Tensor, N: int, linears: GatedLinears) -> list[slice | None]:
    """Rows that are computed at a time: some on a CPU, all (None) elsewhere and beside NF4."""
    M = gate.shape[0]
    packed = any(isinstance(f, Factors) and isinstance(f.weight, NF4Weight) for f in linears)
    step = M if packed or gate.device.type != "cpu" else max(_ROWS, N // _PART_OF_H)
    if step >= M:
        return [None]
    return [slice(start, min(start + step, M)) for start in range(0, M, step)]


def _scaled(dB: Tensor, f: Factors) -> Tensor:
    return dB.mul_(f.constants.scaling).to(given(f.B).dtype).contiguous()


def _shaped(rows: Tensor | None, lead: Sequence[int]) -> Tensor | None:
    return None if rows is None else rows.view(*lead, rows.shape[-1])


def _drawn(f: Factors, M: int, like: Tensor) -> Dropout | None:
    """The dropout of the input [M, K] of a layer."""
    p, seed = f.constants.dropout_p, f.constants.dropout_seed
    if f.A is None or p == 0.0:
        return None
    return Dropout(dropout_mask(seed, M, f.A.shape[1], p, like.device), p)


def _dropped(dropout: Dropout | None, some: slice | None) -> Dropout | None:
    """The dropout of some rows."""
    return None if dropout is None else Dropout(_of(dropout.mask, some), dropout.p)


def _first(memory: Tensor, rows: int) -> Tensor:
    return memory if memory.shape[0] == rows else memory[:rows]


def _of(rows: Tensor, some: slice | None) -> Tensor:
    return rows if some is None else rows[some]


def _with(
    whole: Tensor | None, some: slice | None, part: Tensor, M: int, dtype: torch.dtype
) -> Tensor:
    """The matrix of M rows and `dtype` with some rows, or all: `whole` is None before the first."""
    if some is None:
        return part if part.dtype is dtype else part.to(dtype)
    if whole is None:
        whole = part.new_empty(M, part.shape[1], dtype=dtype)
    whole[some] = part
    return whole
