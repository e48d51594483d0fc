"""Routes on which cuBLAS multiplies with W, and kernels compute what is narrow.

    hybrid     y = s · b ⊙ ((d ⊙ S) Bᵀ) + bias, then y += x Wᵀ
               dX = drop'(dS A), then dX += dY (g ⊙ W), one layer of a group after the other
    augmented  y = [x | S] [W | s · b dᵀ ⊙ B]ᵀ + bias, in one product

With g both make V in place of y, and then y = g ⊙ V + bias in one pass. Each sum is rounded once
at its store; the low-rank part of hybrid once more before. A weight that is decoded lives until the
product with it is enqueued, so a group holds one at a time. Products follow torch's settings, TF32
among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..factors import Factors, Needs
from ..kernels import expand, launch_policy, nf4_decode, shrink
from ..kernels.launch_plans import called
from ..nf4 import NF4Weight
from .protocol import ranks_of
from .torch_low_rank import expand_factor
from .torch_products import wide_dtype, working_dtype
from .triton_operands import alike_A, dense, dropout, factors_A, vectors

_Outputs = tuple[list[Tensor], Tensor | None, Tensor | None]


def hybrid(rows: Tensor, fs: Sequence[Factors], need: Needs) -> _Outputs:
    """y [M, N] of every layer for x [M, K]; S [M, ΣR] and V [M, N], None unless saved."""
    S, V, scale = None, None, 1.0
    low_rank: Sequence[Tensor | None] = [None] * len(fs)
    if fs[0].A is not None:
        S = shrunk(rows, fs)
        low_rank, scale = expanded(S, rows.dtype, fs)
    ys = []
    for f, part in zip(fs, low_rank, strict=True):
        bias = f.bias if f.g is None and part is None else None
        y = add_product(part, rows, dense(f.weight, rows.dtype).T, bias, scale=scale)
        if f.g is not None:
            y, V = _gained(y, f, f.g, need)
        ys.append(y)
    return ys, S if need.saves_S else None, V


def can_augment(fs: Sequence[Factors]) -> bool:
    """Whether all weights are decoded and have a low-rank part."""
    return all(f.A is not None and isinstance(f.weight, NF4Weight) for f in fs)


def augmented(rows: Tensor, fs: Sequence[Factors], need: Needs) -> _Outputs:
    """As `hybrid`, where `can_augment`.

    Layers of a group share [x | S_1 … S_n]: each has zeros in the columns of the others' S.
    """
    V, first_r, columns = None, 0, shrink.padding_of(sum(ranks_of(fs)))
    wide, S = shrink.beside_rows(
        rows, alike_A(fs), dropout(fs[0]), fs[0].constants.rank_spans, saves_S=need.saves_S
    )
    ys = []
    for f, R in zip(fs, ranks_of(fs), strict=True):
        assert isinstance(f.weight, NF4Weight)
        _, gains = vectors(f)
        W = nf4_decode.augmented(
            f.weight.packed, f.weight.quant_state, rows.dtype, f.B, f.constants.scaling,
            gains=gains, first_r=first_r, columns=columns,
        )  # fmt: skip
        if f.weight.decoded is not None:
            f.weight.decoded.offer(W[:, : rows.shape[1]])
        y = add_product(None, wide, W.T, f.bias if f.g is None else None)
        del W
        if f.g is not None:
            y, V = _gained(y, f, f.g, need)
        ys.append(y)
        first_r += R
    return ys, S, V


def input_gradient(dYs: Sequence[Tensor], dS: Any, fs: Sequence[Factors]) -> Tensor:
    """dX [M, K] = drop'(Σ dS_i A_i) + Σ dY_i (g ⊙ W_i), for dS, a Shrunk with the dS_i side by
    side or without values where there is no adapter."""
    dtype, dX = dYs[0].dtype, None
    if dS.values is not None:
        factors = factors_A(fs)
        # Of several layers, a product would take a copy of all A side by side.
        alone = len(factors) == 1 and fs[0].constants.dropout_p == 0.0 and dS.largest is None
        if not (alone and multiplies(dYs[0], factors, max(ranks_of(fs)))):
            dX = expand.input_gradient(dS, dtype, factors, dropout(fs[0]))
        else:
            dX = called(torch.mm, dS.values, _cast(factors[0], dtype))
    for dY, f in zip(dYs, fs, strict=True):
        W = dense(f.weight, dtype)
        if f.g is not None:
            # g multiplies the smaller one of dY [M, N] and W [N, K].
            if dY.shape[0] < W.shape[1]:
                dY = _times(dY, f.g)
            else:
                W = _times(W, f.g.unsqueeze(1))
        dX = add_product(dX, dY, W)
        del W
    assert dX is not None
    return dX


def shrunk(rows: Tensor, fs: Sequence[Factors]) -> Tensor:
    """S [M, ΣR] of all layers."""
    factors, constants, R = factors_A(fs), fs[0].constants, max(ranks_of(fs))
    plain = constants.dropout_p == 0.0 and constants.rank_spans is None
    # Of several layers, a product would take a copy of all A side by side; wide ranks pay for it.
    pays = len(fs) == 1 or R > launch_policy.MAX_BLOCK_R
    if plain and pays and multiplies(rows, factors, R):
        A = factors[0] if len(fs) == 1 else called(torch.cat, factors)
        return called(torch.mm, rows, _cast(A, rows.dtype).T)
    return shrink.of_rows(rows, alike_A(fs), dropout(fs[0]), constants.rank_spans)


def expanded(
    S: Tensor, dtype: torch.dtype, fs: Sequence[Factors]
) -> tuple[Sequence[Tensor], float]:
    """The low-rank part of every y, with the bias where no g comes after it, but for a factor that
    `add_product` takes."""
    f, ranks = fs[0], ranks_of(fs)
    factors = [f.B for f in fs if f.B is not None]
    biases = [None if f.g is not None else f.bias for f in fs]
    scalings = [f.constants.scaling for f in fs]
    same = all(bias is None or bias.dtype == dtype for bias in biases)
    has_gain = (f.b is not None or f.d is not None) and max(ranks) <= launch_policy.MAX_BLOCK_R
    # Of several layers, the kernel is one launch.
    if len(fs) == 1 and same and not has_gain and multiplies(S, factors, max(ranks)):
        Q = expand_factor(f, dtype).T
        if biases[0] is None:
            return [called(torch.mm, S, Q)], scalings[0]
        return [called(torch.addmm, biases[0], S, Q, alpha=scalings[0])], 1.0
    _, gains = vectors(f)
    layers = [
        expand.Layer(B, s, None if bias is None else bias.contiguous())
        for B, s, bias in zip(factors, scalings, biases, strict=True)
    ]
    return expand.outputs(S, dtype, layers, gains), 1.0


def multiplies(x: Tensor, factors: Sequence[Tensor], R: int) -> bool:
    """Whether cuBLAS multiplies x with these factors of rank R: on this device and in their dtype,
    or, of ranks that are several steps of a kernel, with copies of them in the dtype of x."""
    wide = R > launch_policy.MAX_BLOCK_R
    same = wide or all(factor.dtype == x.dtype for factor in factors)
    return same and working_dtype(x) == x.dtype


def add_product(
    out: Tensor | None, a: Tensor, b: Tensor, bias: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """scale · out + a b, in place; a b + bias without out. Rounded once, also on a CPU that
    multiplies 16-bit numbers as float32."""
    work = working_dtype(a)
    if work != a.dtype:
        return called(_add_wide_product, out, a, b, bias, scale)
    if out is not None and scale != 1.0:
        return called(Tensor.addmm_, out, a, b, beta=scale)
    if out is not None:
        return called(Tensor.addmm_, out, a, b)
    if bias is None:
        return called(torch.mm, a, b)
    bias = bias if bias.dtype == a.dtype else called(Tensor.to, bias, a.dtype)
    return called(torch.addmm, bias, a, b)


def _add_wide_product(
    out: Tensor | None, a: Tensor, b: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """:func:`_add_product` in float32 operands."""
    work = working_dtype(a)
    wide = a.to(work) @ b.to(work)
    wide = wide if bias is None else wide + bias
    return wide.to(a.dtype) if out is None else out.copy_(torch.add(wide, out, alpha=scale))


def _gained(V: Tensor, f: Factors, g: Tensor, need: Needs) -> tuple[Tensor, Tensor | None]:
    """y = g ⊙ V + bias, in the memory of V unless it is saved, and V if it is."""
    y = _times(V, g, f.bias, out=None if need.saves_V else V)
    return y, V if need.saves_V else None


def _times(
    matrix: Tensor, g: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """g ⊙ matrix + bias for g [N] or [M, 1], rounded once; a g close to 1 is not rounded to it."""
    return called(_multiply, matrix, g, bias, out)


def _multiply(matrix: Tensor, g: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    out = torch.empty_like(matrix) if out is None else out
    g = g.to(wide_dtype(matrix.dtype))
    if bias is None:
        return torch.mul(matrix, g, out=out)
    return torch.addcmul(bias, matrix, g, out=out)


def _cast(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    return matrix if matrix.dtype == dtype else called(Tensor.to, matrix, dtype)
