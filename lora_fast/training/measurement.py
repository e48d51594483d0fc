"""Costs of a training step: bytes saved for backward, and time relative to another path."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import accelerate, decelerate
from .metrics import compute_context

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one forward and backward pass; ``ratio`` is the median of paired quotients."""

    stock: float
    lora_fast: float
    ratio: float
    pairs: int


def saved_activation_bytes(model: nn.Module, batch: Batch, dtype: torch.dtype) -> int:
    """The bytes that a forward pass keeps alive for backward.

    Counted with ``torch.autograd.graph.saved_tensors_hooks``: whole storages, each once, without
    those that exist anyway (parameters, buffers, quantisation constants, the batch itself).
    """
    # Keep the storages, not only their sizes: a freed one could pass its address to the next.
    permanent = {s.data_ptr() for s in _permanent_storages(model, batch)}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in permanent:
            saved[storage.data_ptr()] = storage
        return tensor

    device = next(model.parameters()).device
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, compute_context(device, dtype):
        loss = model(**batch).loss
    total = sum(storage.nbytes() for storage in saved.values())
    del loss
    return total


def interleaved_step_times(
    model: nn.Module, batches: list[Batch], dtype: torch.dtype, *, repeats: int = 3
) -> StepTimes:
    """Time forward and backward of each batch with stock PEFT and with lora_fast, turn by turn.

    Both see the same batches within the same seconds, in alternating order, so a change in the
    machine's load affects both. The model ends accelerated; its parameters do not change.
    """
    kinds = ("stock", "lora_fast")
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    training = model.training
    model.train()
    for kind in kinds:
        _run_as(model, kind)
        _timed_pass(model, batches[0], dtype)
    for turn, batch in enumerate(batch for _ in range(repeats) for batch in batches):
        for kind in kinds if turn % 2 else kinds[::-1]:
            _run_as(model, kind)
            times[kind].append(_timed_pass(model, batch, dtype))
    accelerate(model)
    model.train(training)
    pairs = list(zip(times["lora_fast"], times["stock"], strict=True))
    return StepTimes(
        stock=statistics.median(times["stock"]),
        lora_fast=statistics.median(times["lora_fast"]),
        ratio=statistics.median(ours / stock for ours, stock in pairs),
        pairs=len(pairs),
    )


def freeze(model: Any) -> Any:
    """Make ``model`` the floor of fine-tuning: all of it frozen, its input requires a gradient.

    Forward and backward then compute every layer's output and the gradient of its input, and
    nothing else. Any method that changes the model from its first layer on pays that.
    """
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model.train()


def interleaved_ratio(
    step: Callable[[Batch], None],
    floor: Callable[[Batch], None],
    batches: list[Batch],
    *,
    repeats: int = 2,
) -> float:
    """The median over batches of the time of ``step`` over that of ``floor``, in turns."""
    device = next(iter(batches[0].values())).device
    for run in (step, floor):
        run(batches[0])
    ratios = []
    for turn, batch in enumerate(batch for _ in range(repeats) for batch in batches):
        order = (step, floor) if turn % 2 else (floor, step)
        seconds = {run: _seconds(run, batch, device) for run in order}
        ratios.append(seconds[step] / seconds[floor])
    return statistics.median(ratios)


def peak_memory(step: Callable[[Batch], None], batch: Batch) -> int:
    """The peak of bytes allocated on the GPU during one step.

    Raises ValueError: the batch is not on a GPU.
    """
    device = next(iter(batch.values())).device
    if device.type != "cuda":
        raise ValueError(f"batch must be on a GPU, got {device}")
    torch.cuda.reset_peak_memory_stats(device)
    step(batch)
    return int(torch.cuda.max_memory_allocated(device))


def forward_backward(model: Any, batch: Batch, dtype: torch.dtype) -> None:
    """Run one forward and backward pass, and drop the gradients."""
    with compute_context(next(model.parameters()).device, dtype):
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad(set_to_none=True)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _run_as(model: nn.Module, kind: str) -> None:
    (accelerate if kind == "lora_fast" else decelerate)(model)


def _timed_pass(model: Any, batch: Batch, dtype: torch.dtype) -> float:
    device = next(model.parameters()).device
    return _seconds(lambda given: forward_backward(model, given, dtype), batch, device)


def _seconds(run: Callable[[Batch], None], batch: Batch, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run(batch)
    synchronize(device)
    return time.perf_counter() - start


def _permanent_storages(model: nn.Module, batch: Batch) -> Iterator[torch.UntypedStorage]:
    for tensor in [*model.parameters(), *model.buffers(), *batch.values()]:
        yield tensor.untyped_storage()
        yield from _quantisation_storages(getattr(tensor, "quant_state", None))


def _quantisation_storages(state: Any) -> Iterator[torch.UntypedStorage]:
    if state is None:
        return
    for value in (state.absmax, state.code, state.offset):
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage()
    yield from _quantisation_storages(state.state2)
