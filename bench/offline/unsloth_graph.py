"""Unsloth's graph, operation for operation (unslothai/unsloth: kernels/fast_lora.py, utils.py).

One autograd function for q, k and v, one for o, one for the MLP. Forward and dX add the low-rank
product to a finished matrix with ``addmm_``. Only the functions' inputs are saved: the shrink is
recomputed in backward, dY B twice. dX of layers with one input is summed by ``addmm_``, too.
Dropout has no fused path. NF4 is decoded in three launches, once in each direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import BLOCKSIZE, BLOCKSIZE_OF_ABSMAX, DTYPE, Shape
from .operations import OperationCounter, Step

# The MLP's function saves the inputs of its activation and recomputes down_proj's input.
_RECOMPUTED = "mlp.down_proj"
_FIRST_OF_INPUT = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def step(shape: Shape, M: int, R: int, weight: str, dropout_p: float) -> Step | None:
    """One step; None with dropout, for which Unsloth runs PEFT's own forward."""
    if dropout_p > 0.0:
        return None
    counter = OperationCounter()
    with counter:
        for N, K in shape.linears.values():
            _decode(counter, N, K, weight)
            _product(_meta(M, K), _meta(N, K).T, _meta(K, R), _meta(R, N))
        forward = len(counter.operations)
        for path, (N, K) in shape.linears.items():
            _backward(counter, M, N, K, R, weight, first=path in _FIRST_OF_INPUT)
    saved = sum(
        M * K * DTYPE.itemsize
        for path, (_, K) in shape.linears.items()
        if path in _FIRST_OF_INPUT and path != _RECOMPUTED
    )
    return Step(counter.operations[:forward], counter.operations[forward:], saved)


def _backward(
    counter: OperationCounter, M: int, N: int, K: int, R: int, weight: str, *, first: bool
) -> None:
    dY, x, A, B = _meta(M, N), _meta(M, K), _meta(K, R), _meta(R, N)
    _meta(K, R).addmm_(x.T, dY @ B.T, beta=0)
    _meta(R, N).addmm_(A.T @ x.T, dY, beta=0)
    _decode(counter, N, K, weight)
    _product(dY, _meta(N, K), B.T, A.T, onto=None if first else _meta(M, K))


def _product(
    x: Tensor, W: Tensor, first: Tensor, second: Tensor, onto: Tensor | None = None
) -> None:
    """x W + (x first) second, optionally on top of a matrix: the factors by ``addmm_``."""
    y = x @ W if onto is None else onto.addmm_(x, W)
    y.addmm_(x @ first, second)


def _decode(counter: OperationCounter, N: int, K: int, weight: str) -> None:
    if weight != "nf4":
        return
    blocks = N * K // BLOCKSIZE
    outer = -(-blocks // BLOCKSIZE_OF_ABSMAX)
    counter.add("decode absmax", 0, blocks + 4 * outer + 4 * 256, 4 * blocks)
    _meta(blocks, dtype=torch.float32).add_(_meta(dtype=torch.float32))
    counter.add("decode weight", 0, N * K // 2 + 4 * blocks, N * K * DTYPE.itemsize)


def _meta(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
