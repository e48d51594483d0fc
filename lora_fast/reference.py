"""The specification: the whole equation in plain torch, differentiated by autograd.

    V = x Wᵀ + s · b ⊙ ((d ⊙ (drop(x) Aᵀ)) Bᵀ)          y = g ⊙ V + bias

Any floating dtype, float64 included. Nothing is fused, saved by hand or rounded on purpose; every
backend is compared with the results of this file. It imports no other
part of the package: an NF4 weight is recognised by its ``dequantize`` method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def dropout_mask(seed: int, M: int, K: int, p: float, device: torch.device | str) -> Tensor:
    """Boolean [M, K], True where an element is kept: a pure function of seed, M, K and p."""
    generator = torch.Generator(device=device).manual_seed(seed)
    keep = torch.empty((M, K), dtype=torch.bool, device=device)
    return keep.bernoulli_(1.0 - p, generator=generator)


def adapted_linear(
    x: Tensor,
    weight: Any,
    bias: Tensor | None = None,
    *,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    b: Tensor | None = None,
    d: Tensor | None = None,
    g: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    dropout_mask: Tensor | None = None,
    rank_spans: Tensor | None = None,
) -> Tensor:
    """y = g ⊙ (x Wᵀ + s · b ⊙ ((d ⊙ (drop(x) Aᵀ)) Bᵀ)) + bias.

    x [..., K], weight [N, K] (a tensor or an object with ``dequantize(dtype)``), bias [N], A [R,
    K], B [N, R], b [N], d [R], g [N] → y [..., N]. Every operand is cast to x's dtype, the result
    has it. ``dropout_mask`` [M, K] (True: kept) replaces the mask drawn from
    ``dropout_seed``. ``rank_spans`` [samples, 2]: the rows of sample i, the i-th of equal parts,
    use the columns start ≤ r < stop of the rank alone. Sources: LoRA (Hu et al. 2021, eq. 3), VeRA
    (Kopiczko et al. 2023, eq. 2: b, d), DoRA (Liu et al. 2024, eq. 5: g), IA3 (Liu et al. 2022: g),
    KaSA (Wang et al. 2024: d), DeLoRA (Bini et al. 2025: A ⊙ w, d), aLoRA (Greenewald et al.
    2025: spans of rows).
    """
    dtype = x.dtype
    rows = x.reshape(-1, x.shape[-1])
    dense = weight.dequantize(dtype) if hasattr(weight, "quant_type") else weight.to(dtype)
    V = rows @ dense.T
    if A is not None and B is not None:
        S = _drop(rows, dropout_p, dropout_seed, dropout_mask) @ A.to(dtype).T
        if rank_spans is not None:
            S = torch.where(_used(rank_spans, *S.shape), S, torch.zeros_like(S))
        V = V + scaling * _gain(b, dtype) * ((_gain(d, dtype) * S) @ B.to(dtype).T)
    y = _gain(g, dtype) * V
    if bias is not None:
        y = y + bias.to(dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def gated_mlp(
    x: Tensor,
    gate: Mapping[str, Any] | Tensor,
    up: Mapping[str, Any] | Tensor | None,
    down: Mapping[str, Any] | None,
    activation: str,
) -> Tensor:
    """y = down(h), h = act(gate(x)) ⊙ up(x).

    gate, up, down: the arguments of :func:`adapted_linear` after x, by name, or what gate or up
    gives [..., I]. Without up, gate gives both [..., 2I], gate first; without down the result is h.
    ``activation``: silu, gelu (erf), gelu_tanh, relu or relu2. Source: Shazeer 2020, GLU Variants
    Improve Transformer.
    """
    gate = gate if isinstance(gate, Tensor) else adapted_linear(x, **gate)
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    elif not isinstance(up, Tensor):
        up = adapted_linear(x, **up)
    h = _activated(gate, activation) * up
    return h if down is None else adapted_linear(h, **down)


def _activated(gate: Tensor, activation: str) -> Tensor:
    """act(gate), each by its definition."""
    if activation == "silu":
        return gate * torch.sigmoid(gate)
    if activation == "gelu":
        return gate * 0.5 * (1.0 + torch.erf(gate / math.sqrt(2.0)))
    if activation == "gelu_tanh":
        inner = math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1.0 + torch.tanh(inner))
    rectified = torch.relu(gate)
    if activation not in ("relu", "relu2"):
        raise ValueError(f"activation must be a known one, got {activation!r}")
    return rectified if activation == "relu" else rectified**2


def adapted_experts(
    x: Tensor,
    weight: Any,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    *,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """y_r = W_e x_r + s · B_e A_e x_r + bias_e for the rows r of every expert e.

    x [T, K] sorted by expert, expert_offsets [E]: where the rows of each end, weight [E, N, K] (a
    tensor or an object with ``dequantize(dtype)``), bias [E, N], A [E, R, K], B [E, N, R] → y
    [T, N]; rows beyond the last offset are zero. Source: LoRA (Hu et al. 2021, eq. 3).
    """
    dtype = x.dtype
    dense = weight.dequantize(dtype) if hasattr(weight, "quant_type") else weight.to(dtype)
    parts, start = [], 0
    for expert, stop in enumerate(expert_offsets.tolist()):
        low_rank: dict[str, Any] = {}
        if A is not None and B is not None:
            low_rank = {"A": A[expert], "B": B[expert]}
        parts.append(
            adapted_linear(
                x[start:stop], dense[expert], None if bias is None else bias[expert],
                scaling=scaling, **low_rank,
            )
        )  # fmt: skip
        start = stop
    return torch.cat([*parts, x.new_zeros(x.shape[0] - start, dense.shape[1])])


def experts_block(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: dict[str, Any],
    down: dict[str, Any],
    gate: Callable[[Tensor], Tensor],
) -> Tensor:
    """out_t = Σ_j w_tj · down_e(gate(gate_up_e(x_t))) with e = top_k_index[t, j].

    hidden_states [T, H], top_k_index and top_k_weights [T, k] → out [T, H]. ``gate_up`` and
    ``down`` are the arguments of :func:`adapted_experts` from ``weight`` on; ``gate`` maps the rows
    [M, P] of the first projection to [M, I]. An index ≥ E names no expert and adds nothing. Source:
    sparsely gated mixture of experts (Shazeer et al. 2017, eq. 1).
    """
    tokens, k = top_k_index.shape
    experts = gate_up["weight"].shape[0]
    ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
    offsets = torch.stack([(ids <= expert).sum() for expert in range(experts)])
    rows = hidden_states[order // k]
    inner = gate(adapted_experts(rows, expert_offsets=offsets, **gate_up))
    y = adapted_experts(inner, expert_offsets=offsets, **down)
    weighted = y * top_k_weights.reshape(-1, 1)[order] * (ids < experts).unsqueeze(1)
    back = torch.argsort(order)
    return weighted[back].reshape(tokens, k, y.shape[1]).sum(dim=1).to(hidden_states.dtype)


def _gain(vector: Tensor | None, dtype: torch.dtype) -> Tensor | float:
    return 1.0 if vector is None else vector.to(dtype)


def _used(spans: Tensor, M: int, R: int) -> Tensor:
    """Boolean [M, R], True where a row uses a column of the rank."""
    start, stop = spans.repeat_interleave(M // spans.shape[0], dim=0).unsqueeze(2).unbind(1)
    columns = torch.arange(R, device=spans.device)
    return (start <= columns) & (columns < stop)


def _drop(x: Tensor, p: float, seed: int | None, mask: Tensor | None) -> Tensor:
    if p == 0.0:
        return x
    if mask is None:
        if seed is None:
            raise ValueError("dropout_seed must be given when dropout_p > 0, got None")
        mask = dropout_mask(seed, x.shape[0], x.shape[1], p, x.device)
    kept = torch.where(mask, x, torch.zeros_like(x))
    return kept / (1.0 - p) if p < 1.0 else kept
