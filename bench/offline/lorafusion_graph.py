"""LoRAFusion's graph, operation for operation (CentML/lorafusion: ops/lora_v1.py, ops/triton_ops).

The shrink is a product of its own, before one kernel for x Wᵀ + s · S Bᵀ. In backward one kernel
reads dY once for dB and dS, which it sums by float32 atomics into zeroed matrices that are then
rounded. Dropout is a kernel that stores the dropped x and the mask; both are saved. There is no
fused path for NF4.
"""

from __future__ import annotations

import torch
from lora_fast.kernels.launch_policy import GemmConfig
from torch import Tensor

from .layers import DTYPE, Shape
from .operations import OperationCounter, Step

# What its tuner found for every product on an H100.
TILE = GemmConfig(128, 256, 64, 64, 8, num_warps=8, num_stages=3)


def step(shape: Shape, M: int, R: int, weight: str, dropout_p: float) -> Step | None:
    """One step; None for a weight that is not dense."""
    if weight != "dense":
        return None
    counter, saved = OperationCounter(), 0
    with counter:
        inputs = set()
        for path, (N, K) in shape.linears.items():
            _forward(counter, M, N, K, R, dropout_p)
            # Without dropout the layers of one input save the same tensor.
            new = dropout_p > 0.0 or _input_of(path) not in inputs
            inputs.add(_input_of(path))
            saved += M * R * DTYPE.itemsize + (M * K * DTYPE.itemsize if new else 0)
            saved += M * K if dropout_p > 0.0 else 0
        forward = len(counter.operations)
        for N, K in shape.linears.values():
            _backward(counter, M, N, K, R, dropout_p)
        for path, (_, K) in shape.linears.items():
            if path in ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"):
                _meta(M, K).add_(_meta(M, K))
    return Step(counter.operations[:forward], counter.operations[forward:], saved)


def _forward(counter: OperationCounter, M: int, N: int, K: int, R: int, dropout_p: float) -> None:
    x = M * K * DTYPE.itemsize
    if dropout_p > 0.0:
        counter.add("dropout", 0, x, x + M * K)
    _meta(M, K) @ _meta(K, R)
    factors = (N * K + M * R + N * R) * DTYPE.itemsize
    counter.add("x W + S B", 2 * M * N * (K + R), x + factors, M * N * DTYPE.itemsize, TILE)


def _backward(counter: OperationCounter, M: int, N: int, K: int, R: int, dropout_p: float) -> None:
    sums = [_zeros(N, R), _zeros(M, R)]
    sum_bytes = 4 * (M + N) * R
    dY = M * N * DTYPE.itemsize
    read = dY + (M * R + N * R) * DTYPE.itemsize + sum_bytes
    counter.add("dB, dS by atomics", 4 * M * N * R, read, sum_bytes)
    for total in sums:
        total.to(DTYPE)
    _meta(R, M) @ _meta(M, K)
    factors = (N * K + M * R + K * R) * DTYPE.itemsize
    mask = M * K if dropout_p > 0.0 else 0
    counter.add(
        "dY W + dS A", 2 * M * K * (N + R), dY + factors + mask, M * K * DTYPE.itemsize, TILE
    )


def _input_of(path: str) -> str:
    shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    name = path.split(".")[1]
    return shared.get(name, name)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="meta")


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device="meta")
