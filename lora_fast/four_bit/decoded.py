"""Weights that stay decoded between a recomputed forward pass and its backward pass.

Activation checkpointing runs the forward of a segment again when its backward is due. Both need W,
so an NF4 weight that the recomputed forward decodes is saved for that backward, in the node of the
graph and no longer: nothing is cached. A process saves at most `bytes_saved.limit` bytes at a time,
by default those of the largest block of a model, which is what one recomputed block needs.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import is_four_bit


def _limit_by_environment() -> int | None:
    value = os.environ.get("LORA_FAST_DECODED_MB", "")
    if not value:
        return None
    if not value.isdecimal():
        raise ValueError(f"LORA_FAST_DECODED_MB must be a whole number ≥ 0, got {value!r}")
    return int(value) << 20


class _Bytes:
    """Decoded bytes that are saved, and how many of them may be."""

    def __init__(self) -> None:
        self.told = _limit_by_environment()
        self.largest_block = self.saved = 0
        self._lock = threading.Lock()

    @property
    def limit(self) -> int:
        return self.largest_block if self.told is None else self.told

    def has_room(self, count: int) -> bool:
        return self.saved + count <= self.limit

    def take(self, W: Tensor) -> bool:
        """Whether W may be saved; it counts until its memory is released."""
        count = W.numel() * W.element_size()
        with self._lock:
            if not self.has_room(count):
                return False
            self.saved += count
        # Of the storage, not of a tensor: checkpointing saves another tensor of the same memory.
        weakref.finalize(W.untyped_storage(), self._release, count).atexit = False
        return True

    def _release(self, count: int) -> None:
        with self._lock:
            self.saved -= count


bytes_saved = _Bytes()


@dataclass(eq=False)
class Decoded:
    """W [N, K] of one NF4 weight, once a backend has decoded it for a node of the graph."""

    dense: Tensor | None = None

    def once(self, dtype: torch.dtype, decode: Callable[[], Tensor]) -> Tensor:
        """W in `dtype` by decode(), unless it is there already."""
        if self.dense is not None and self.dense.dtype == dtype:
            return self.dense
        W = decode()
        self.offer(W)
        return W

    def offer(self, W: Tensor) -> None:
        """Keep W as `dense`, if the limit allows it."""
        if self.dense is None and bytes_saved.take(W):
            self.dense = W


def provide_for(
    model: nn.Module, bytes_of_others: Callable[[nn.Module], int] | None = None
) -> None:
    """Allow as many decoded bytes as the largest block of `model` has: an element of a ModuleList
    (a decoder layer), or a whole model without one. `bytes_of_others`: those of a module that is
    no 4-bit layer."""
    others = bytes_of_others or (lambda module: 0)
    blocks = [block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m]
    most = max(sum(_bytes_of(m) or others(m) for m in each.modules()) for each in blocks or [model])
    bytes_saved.largest_block = max(bytes_saved.largest_block, most)


def _bytes_of(layer: Any) -> int:
    if not is_four_bit(layer):
        return 0
    dtype = layer.compute_dtype or torch.bfloat16
    return layer.in_features * layer.out_features * dtype.itemsize
