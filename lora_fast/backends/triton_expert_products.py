"""Products of the rows of experts with their weights, as the Triton backend computes them.

    output     x W[e]ᵀ + s · S B[e]ᵀ + bias[e]        gradient    dY W[e] + dS A[e]

By torch's grouped product where that is one launch, the low rank added to it; else by
expert_product, the low rank in the same sum; on a CPU, which runs kernels in tests, an expert after
the other. A 4-bit weight is decoded into a workspace [W | s · B | 0], or [W ; A ; 0], and then rows
[x | S | 0] or [dY | dS | 0] make the whole in one product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..experts.nf4_experts import NF4Experts
from ..experts.operands import Projection, spans
from ..kernels import environment, expert_product, expert_shrink, nf4_decode, shrink
from ..kernels.expert_product import LowRank
from ..kernels.launch_plans import called
from . import triton_routes
from .torch_low_rank import given

# A row of an operand of a grouped product starts at a multiple of 16 bytes.
_ALIGNED = 8
# Compute capabilities on which torch's grouped product is one launch; on others it waits for the
# offsets.
_GROUPED_ON = (9, 10)
_grouped: Any = getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def readable(p: Projection) -> Projection:
    """With a B and a bias whose rows lie side by side: PEFT stores the experts' index last, and
    every tile of an expert would read the sectors of others; of a bias kernels know one stride."""
    return p._replace(B=_contiguous(p.B), bias=_contiguous(p.bias))


def _contiguous(factor: Tensor | None) -> Tensor | None:
    if factor is None or factor.is_contiguous():
        return factor
    copied: Tensor = called(Tensor.contiguous, factor)
    return copied


def augments(p: Projection) -> bool:
    """Whether W is decoded into a workspace that holds the low rank beside it."""
    return isinstance(p.weight, NF4Experts) and p.A is not None


def _augmented(p: Projection, dtype: torch.dtype) -> Tensor:
    """[W | s · B | 0] [E, N, K + padding], for rows [x | S | 0]."""
    weight, B = _in_nf4(p), given(p.B)
    packed = weight.packed, weight.quant_state, dtype
    if weight.transposed:
        wide = nf4_decode.above(*packed, called(_scaled, B, scaling=p.scaling).mT).mT
    else:
        columns = shrink.padding_of(B.shape[2])
        wide = nf4_decode.augmented(*packed, B.flatten(0, 1), p.scaling, columns=columns)
    if weight.decoded is not None:
        weight.decoded.offer(wide[:, :, : weight.shape[2]])
    return wide


def _scaled(B: Tensor, scaling: float) -> Tensor:
    return B.float() * scaling


def turned(p: Projection, dtype: torch.dtype) -> Tensor:
    """[W ; A ; 0]ᵀ [E, K, N + padding], for rows [dY | dS | 0]."""
    weight, A = _in_nf4(p), given(p.A)
    packed = weight.packed, weight.quant_state, dtype
    if not weight.transposed:
        return nf4_decode.above(*packed, A).mT
    columns = shrink.padding_of(A.shape[1])
    return nf4_decode.augmented(*packed, called(_rows_of_transposes, A), columns=columns)


def _rows_of_transposes(A: Tensor) -> Tensor:
    return A.mT.reshape(-1, A.shape[1]).contiguous()


def _in_nf4(p: Projection) -> NF4Experts:
    assert isinstance(p.weight, NF4Experts)
    return p.weight


def beside(rows: Tensor, offsets: Tensor, p: Projection) -> tuple[Tensor, Tensor | None]:
    """Rows of the product with p's weight, [rows | S | 0] or as they are, and S."""
    widens = augments(p)
    if p.A is None:
        return rows, None
    found = expert_shrink.gather(rows, None, offsets, p.A.mT, stores_rows=widens, widens=widens)
    return (found.rows if widens else rows), found.S


def output(
    rows: Tensor,
    S: Tensor | None,
    p: Projection,
    offsets: Tensor,
    *,
    widened: bool,
    clears: bool = False,
) -> Tensor:
    """rows W[e]ᵀ + s · S B[e]ᵀ + bias[e] [P, N], for rows [x | S | 0] if they are `widened`."""
    if not widened:
        low_rank = _low_rank(S, p.B, p)
        return product(rows, dense(p, rows.dtype), offsets, low_rank, p.bias, clears=clears)
    return product(rows, _augmented(p, rows.dtype), offsets, None, p.bias, clears=clears)


def input_gradient(
    dY: Tensor, dS: Tensor | None, p: Projection, offsets: Tensor, *, clears: bool = False
) -> Tensor:
    """dY W[e] + dS A[e] [P, K]; without dS the first alone."""
    low_rank = None if dS is None else LowRank(dS, given(p.A).mT)
    return product(dY, dense(p, dY.dtype).mT, offsets, low_rank, clears=clears)


def _low_rank(S: Tensor | None, factor: Tensor | None, p: Projection) -> LowRank | None:
    return None if S is None else LowRank(S, given(factor), p.scaling)


def dense(p: Projection, dtype: torch.dtype) -> Tensor:
    """W [E, N, K] in any dtype; of a 4-bit weight decoded to `dtype`, in one launch."""
    weight = p.weight
    if not isinstance(weight, NF4Experts):
        return weight
    W: Tensor = nf4_decode.decode(weight.packed, weight.quant_state, dtype)
    W = W.mT if weight.transposed else W
    if weight.decoded is not None:
        weight.decoded.offer(W)
    return W


def product(
    rows: Tensor,
    W: Tensor,
    offsets: Tensor,
    low_rank: LowRank | None = None,
    bias: Tensor | None = None,
    *,
    clears: bool = False,
) -> Tensor:
    """rows [P, K] W[e]ᵀ for W [E, L, K], with a low-rank part and a bias. Rows of no expert are
    zeros if there is either, or with `clears`; else nobody may read them."""
    out: Tensor
    multiply = base_product_of(rows, W)
    if multiply is None:
        out = expert_product.product(rows, W, offsets, low_rank, bias)
        return out
    out = called(multiply, rows, W, offsets)
    if clears or low_rank is not None or bias is not None:
        expert_product.add_(out, offsets, low_rank, bias)
    return out


def base_product_of(rows: Tensor, W: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """What makes rows W[e]ᵀ of (rows, W, offsets) alone; None: a kernel with all of it."""
    if rows.device.type == "cpu":
        return _one_by_one
    return _in_one_launch if is_one_launch(rows, W) else None


def _in_one_launch(rows: Tensor, W: Tensor, offsets: Tensor) -> Tensor:
    out: Tensor = _grouped(rows, W.mT, offs=offsets.int())
    return out


def is_one_launch(rows: Tensor, W: Tensor) -> bool:
    """Whether torch's grouped product takes these operands, in one launch and without a copy of a W
    in another dtype."""
    if _grouped is None or not rows.dtype is W.dtype is torch.bfloat16 or rows.stride(-1) != 1:
        return False
    sizes = [*W.shape[1:], rows.stride(0), W.storage_offset(), rows.storage_offset()]
    if 1 not in W.stride()[1:] or any(size % _ALIGNED for size in sizes):
        return False
    arch = environment.current_arch()
    return arch is not None and arch // 10 in _GROUPED_ON


def _one_by_one(rows: Tensor, W: Tensor, offsets: Tensor) -> Tensor:
    out = rows.new_zeros(rows.shape[0], W.shape[1])
    for expert, start, stop in spans(offsets, rows.shape[0]):
        of_one = W[expert].to(rows.dtype)
        out[start:stop] = triton_routes.add_product(None, rows[start:stop], of_one.mT)
    return out
