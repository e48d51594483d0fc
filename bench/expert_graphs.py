"""Unsloth's and Axolotl's graphs of a block of experts with LoRA, after their published sources.

    y_e = x_e W_eᵀ + s (x_e A_eᵀ) B_eᵀ + bias_e        of gate_up and of down, rows sorted by expert

Models: the operations that their code calls, on fake tensors and counted like those of PEFT and
lora_fast; nothing of theirs is imported. Unsloth (unsloth_zoo/temporary_patches/moe_utils.py)
multiplies with ``grouped_mm`` under autograd, the low rank apart: saved are the gathered rows, the
rows before and after the gate and the outputs before they are weighted. Axolotl (axolotl/
integrations/kernels/libs/scattermoe_lora) has one Triton launch for x W + s (x A) B that gathers
and scatters, one for dX and one for dA and dB of a projection; for a gradient x is gathered first,
and the outputs of all experts are saved for that of the routing weights. Its fused dX, which it
leaves off by default, is on here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .offline.operations import OperationCounter

MODELS = ("unsloth", "axolotl")


class ModelledExperts(nn.Module):
    """The block of a module of transformers, with the graph of `kind`; ``counter`` takes launches
    that are no operations of PyTorch."""

    counter: OperationCounter

    def __init__(self, kind: str, experts: Any, R: int) -> None:
        super().__init__()
        self.kind, self.experts = kind, experts
        for name in ("gate_up_proj", "down_proj"):
            E, N, K = self._weight(name).shape
            like = {"device": experts.down_proj.device, "dtype": experts.down_proj.dtype}
            self.register_parameter(f"{name}_A", nn.Parameter(torch.empty(E, R, K, **like)))
            self.register_parameter(f"{name}_B", nn.Parameter(torch.empty(E, N, R, **like)))

    def forward(self, x: Tensor, index: Tensor, w: Tensor) -> Tensor:
        run = _unsloth if self.kind == "unsloth" else _axolotl
        return run(self, x, index, w)

    def operands(self, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """W [E, N, K], A, B and the bias [E, N] of a projection."""
        A, B = (self.get_parameter(f"{name}_{factor}") for factor in "AB")
        return self._weight(name), A, B, getattr(self.experts, f"{name}_bias", None)

    def _weight(self, name: str) -> Tensor:
        weight: Tensor = self.experts.get_parameter(name)
        return weight.transpose(1, 2) if self.experts.is_transposed else weight

    def sorted(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids and places of the sorted rows, and where the rows of each expert end."""
        ids, places = index.flatten().sort(stable=True)
        E = self.experts.num_experts
        self.counter.add("bincount", 0, ids.nbytes, 8 * E)
        return ids, places, ids.new_empty(E, dtype=torch.int64).cumsum(0, dtype=torch.int32)


def _unsloth(block: ModelledExperts, x: Tensor, index: Tensor, w: Tensor) -> Tensor:
    ids, places, ends = block.sorted(index)
    tokens = places // index.shape[1]

    def projected(rows: Tensor, name: str) -> Tensor:
        W, A, B, bias = block.operands(name)
        y = _grouped(rows, W.transpose(1, 2), ends)
        y = y + _grouped(_grouped(rows, A.transpose(1, 2), ends), B.transpose(1, 2), ends) * 1.0
        return y if bias is None else y + bias[ids]

    h = _gated(block, projected(x[tokens], "gate_up_proj"))
    y = projected(h, "down_proj") * w.flatten()[places].unsqueeze(1)
    return torch.zeros_like(x).index_add(0, tokens, y)


def _axolotl(block: ModelledExperts, x: Tensor, index: Tensor, w: Tensor) -> Tensor:
    ids, places, ends = block.sorted(index)
    routing = (ids, places, ends)
    W, A, B, bias = block.operands("gate_up_proj")
    gate_up: Any = _Scattered.apply(block.counter, x, W, A, B, bias, None, *routing)
    W, A, B, bias = block.operands("down_proj")
    h = _gated(block, gate_up)
    out: Tensor = _Scattered.apply(block.counter, h, W, A, B, bias, w, *routing)
    return out


def _gated(block: ModelledExperts, gate_up: Tensor) -> Tensor:
    if not block.experts.is_concatenated:
        h: Tensor = block.experts._apply_gate(gate_up)
        return h
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def _grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    y: Tensor = torch._grouped_mm(rows, weight, offs=ends)  # type: ignore[attr-defined]
    return y


class _Scattered(torch.autograd.Function):
    """One projection: of x that is gathered, or of sorted rows that are scattered and weighted."""

    @staticmethod
    def forward(
        ctx: Any,
        counter: OperationCounter,
        x: Tensor,
        W: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        w: Tensor | None,
        ids: Tensor,
        places: Tensor,
        ends: Tensor,
    ) -> Tensor:
        y = x.new_empty(ids.shape[0], W.shape[1])
        _launch(counter, "scatter2scatter_lora", (x, W, A, B, bias, ids, places), (y,))
        of_experts = None
        if w is not None:
            of_experts = y.view(*w.shape, -1)
            y = (w.unsqueeze(1) @ of_experts).squeeze(1)
        ctx.save_for_backward(x, A, B, ids, places, ends, w, of_experts)
        ctx.counter, ctx.W = counter, W
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Any, ...]:
        x, A, B, ids, places, ends, w, of_experts = ctx.saved_tensors
        counter, dw = ctx.counter, None
        if w is not None:
            dw = (of_experts @ dY.unsqueeze(-1)).squeeze(-1)
            grouped = of_experts.flatten(0, 1)
            _launch(counter, "group", (dY, places, w), (grouped,))
            dY, rows = grouped, x
        else:
            rows = x.new_empty(places.shape[0], x.shape[1])
            _launch(counter, "group", (x, places), (rows,))
        dA, dB = torch.empty_like(A), torch.empty_like(B)
        _launch(counter, "group_bwd_lora", (dY, rows, A, B, ends), (dA, dB))
        dX = torch.empty_like(rows)
        _launch(counter, "scatter2scatter_lora_dX", (dY, ctx.W, A, B, ids, places), (dX,))
        if w is None:
            dX = dX.view(x.shape[0], -1, x.shape[1]).sum(1)
        return None, dX, None, dA, dB, None, dw, None, None, None


def _launch(
    counter: OperationCounter, name: str, read: tuple[Tensor | None, ...], written: tuple[Any, ...]
) -> None:
    counter.add(
        name, 0, sum(t.nbytes for t in read if t is not None), sum(t.nbytes for t in written)
    )
