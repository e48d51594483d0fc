"""Launches and bytes of a step of a block of experts, counted at the sizes of real models.

Operations of PyTorch run on fake tensors. lora_fast's kernels are compiled for sm_90 and recorded
in place of launched, on memory that is never touched; torch's grouped products between them count
as one launch each. Every launch reads its arguments and writes its results once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .expert_blocks import Block, R, build, check_fused, experts_of, step_of
from .expert_graphs import MODELS, ModelledExperts
from .instruments import stub_driver
from .instruments.saved_tensors import SavedTensors
from .offline.operations import OperationCounter

TORCH, KERNELS = "lora_fast torch", "lora_fast"
CONTESTANTS = ("frozen", "peft", *MODELS, TORCH, KERNELS)
ARCH = 90
# Without a product of its own it adds to its result, which it reads, too.
_ADDS = "expert_product"


@dataclass(frozen=True)
class Counted:
    """Of one step: launches, bytes read and written, those of the largest result, bytes saved."""

    launches: int
    bytes: int
    largest: int
    saved: int


def counts(block: Block, tokens: int, contestant: str) -> dict[str, Any]:
    """Launches, bytes, the largest result and the bytes saved of one contestant's step."""
    found = (
        _of_kernels(block, tokens)
        if contestant == KERNELS
        else _of_operations(block, tokens, contestant)
    )
    return {
        "layer": block.name,
        "M": tokens,
        "contestant": contestant,
        "launches": found.launches,
        "bytes": found.bytes,
        "largest": found.largest // 2,
        "weight": block.E * 2 * block.I * block.H,
        "saved": found.saved,
    }


def _of_operations(block: Block, tokens: int, contestant: str) -> Counted:
    from lora_fast.backends import torch_grouped
    from lora_fast.skeleton import imagined

    with torch.device("meta"):
        built = _built(block, contestant)
    grouped = mock.patch.object(torch_grouped, "takes", torch_grouped.fits)
    with grouped, imagined(built) as experts:
        counter = OperationCounter()
        if isinstance(experts, ModelledExperts):
            experts.counter = counter
        saved = _step(experts, block, tokens, counter)
        if contestant == TORCH:
            check_fused(experts)
    return _total(counter, saved)


def _of_kernels(block: Block, tokens: int) -> Counted:
    import lora_fast
    from lora_fast.backends import triton_expert_products

    with torch.device("meta"):
        built = build(block, torch.bfloat16)["lora_fast"]
    experts = built.to_empty(device="cpu")
    counter = OperationCounter(compute=False)

    def grouped(rows: Tensor, W: Tensor, offsets: Tensor) -> Tensor:
        y = rows.new_empty(rows.shape[0], W.shape[1])
        counter.add("grouped_mm", 0, rows.nbytes + W.nbytes + offsets.nbytes, y.nbytes)
        return y

    with (
        lora_fast.set_backend("triton"),
        mock.patch.object(triton_expert_products, "_one_by_one", grouped),
        stub_driver.recording(ARCH) as log,
    ):
        saved = _step(experts, block, tokens, counter)
    check_fused(experts)
    weights = {p.shape for p in (experts.get_base_layer().parameters())}
    for launch in log.launches:
        tensors = [
            leaf
            for leaf in tree_leaves(list(launch.arguments.values()))
            if isinstance(leaf, stub_driver.TensorArgument)
        ]
        result = max(t.nbytes for t in tensors if not _is_weight(t, weights))
        read = sum(t.nbytes for t in tensors) - (0 if launch.name == _ADDS else result)
        counter.add(launch.name, 0, read, result)
    return _total(counter, saved)


def _is_weight(tensor: stub_driver.TensorArgument, weights: set[Any]) -> bool:
    E, *sizes = tensor.shape if len(tensor.shape) == 3 else (0,)
    return any(sorted(shape) == sorted((E, *sizes)) for shape in weights)


def _total(counter: OperationCounter, saved: int) -> Counted:
    operations = counter.operations
    largest = max(op.written for op in operations)
    return Counted(len(operations), sum(op.bytes for op in operations), largest, saved)


def _step(experts: nn.Module, block: Block, tokens: int, counter: OperationCounter) -> int:
    """The bytes that a step saves for backward."""
    forward, inputs = step_of(experts, block, tokens, torch.bfloat16)
    dY = torch.empty(tokens, block.H, dtype=torch.bfloat16)
    with SavedTensors([*experts.parameters(), *inputs]) as saved, counter:
        out = forward()
    with counter:
        out.backward(dY)
    return saved.bytes


def _built(block: Block, contestant: str) -> nn.Module:
    if contestant in MODELS:
        base = experts_of(block).to(torch.bfloat16).requires_grad_(False)
        return ModelledExperts(contestant, base, R)
    return build(block, torch.bfloat16)["lora_fast" if contestant == TORCH else contestant]
