"""NeMo's graph of a decoder layer with LoRA, operation for operation, after its public sources.

NVIDIA-NeMo/Megatron-Bridge (peft/lora_layers.py, peft/utils.py), which wraps the linears of
NVIDIA/Megatron-LM on top of NVIDIA/TransformerEngine. q, k and v are one linear, so are gate and
up: each has one A of rank r for all of its outputs, where everybody else has one for each.

    nemo             LoRALinear: y = x Wᵀ, S = x Aᵀ, V = S Bᵀ, V · scaling and y + V, each a launch;
                     backward the same way round, and the gradients of the two uses of x are added
    nemo, op fuser   TEFusedLoRALinear (use_transformer_engine_op_fuser): the scaling is a factor of
                     the products; y + V and the sum of dX are products that add to a matrix

SwiGLU is one compiled kernel in each direction (megatron/core/fusions/fused_bias_swiglu.py). It
saves gate and up; Transformer Engine saves no input of a frozen weight, but the adapter saves its
own: that of linear_fc2, too. Gradients of factors are written as everybody's are, not added to
Megatron's float32 buffers. Megatron's linears have no 4-bit weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import DTYPE, Shape
from .operations import OperationCounter, Step

KINDS = ("nemo", "nemo, op fuser")


def step(shape: Shape, M: int, R: int, kind: str) -> Step:
    """One step without dropout, the activation in it; ``kind`` is one of KINDS."""
    counter = OperationCounter()
    forward, backward = (
        (_forward, _backward) if kind == "nemo" else (_fused_forward, _fused_backward)
    )
    gate = M * shape.intermediate * DTYPE.itemsize
    linears = _linears(shape)
    with counter:
        for N, K in linears:
            forward(M, N, K, R)
        counter.add("swiglu", 0, 2 * gate, gate)
        launched = len(counter.operations)
        for N, K in linears:
            backward(M, N, K, R)
        counter.add("swiglu backward", 0, 3 * gate, 2 * gate)
    saved = sum(M * (K + R) * DTYPE.itemsize for _, K in linears) + 2 * gate
    return Step(counter.operations[:launched], counter.operations[launched:], saved)


def _linears(shape: Shape) -> list[tuple[int, int]]:
    """(N, K) of linear_qkv, linear_proj, linear_fc1 and linear_fc2."""
    return [
        (shape.q_width + 2 * shape.kv_width, shape.hidden),
        (shape.hidden, shape.q_width),
        (2 * shape.intermediate, shape.hidden),
        (shape.hidden, shape.intermediate),
    ]


def _forward(M: int, N: int, K: int, R: int) -> None:
    x = _meta(M, K)
    y = x @ _meta(K, N)
    V = x @ _meta(K, R) @ _meta(R, N)
    y + V * 2.0


def _backward(M: int, N: int, K: int, R: int) -> None:
    dY, x, S = _meta(M, N), _meta(M, K), _meta(M, R)
    dV = dY * 2.0
    dV.T @ S
    dS = dV @ _meta(N, R)
    dS.T @ x
    dS @ _meta(R, K) + dY @ _meta(N, K)


def _fused_forward(M: int, N: int, K: int, R: int) -> None:
    x = _meta(M, K)
    y = x @ _meta(K, N)
    y.addmm_(x @ _meta(K, R), _meta(R, N), alpha=2.0)


def _fused_backward(M: int, N: int, K: int, R: int) -> None:
    dY, x, S = _meta(M, N), _meta(M, K), _meta(M, R)
    dY.T @ S
    dS = dY @ _meta(N, R)
    dS.T @ x
    dX = dS @ _meta(R, K)
    dX.addmm_(dY, _meta(N, K))


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device="meta")
