"""Counts what a piece of PyTorch would launch on a GPU: every operation that is not a view.

Operations run on meta tensors (or, with ``compute=False``, on memory that is never touched), at
real sizes and without cost. Each counts as one launch that reads its arguments and writes its
results once. Dropout is counted as CUDA's fused ``native_dropout``, bitsandbytes' ``gemm_4bit`` as
what it is at the sizes of training: a decoding of the weight followed by a product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from lora_fast.kernels.launch_policy import GemmConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
    "set_",
    "is_same_size",
    "device",  # asked of a fake tensor
    "_local_scalar_dense",
    # lora_fast's seed, which on CUDA comes from the generator's state and not from a kernel.
    "randint",
}
# Results below this are worth computing: seeds, counters.
_SMALL = 1 << 16


@dataclass(frozen=True)
class Operation:
    """One launch: FLOPs of its matrix products, bytes read and written.

    ``issue_seconds`` is a lower bound of its time from its instructions, where they are known;
    ``tile`` that of a Triton product with W; ``added_to``: bytes of a matrix that cuBLAS adds its
    product to. lora_fast.tuning.rooflines makes a time of them.
    """

    name: str
    flops: int
    read: int
    written: int
    issue_seconds: float = 0.0
    tile: GemmConfig | None = None
    added_to: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass
class Step:
    """The launches of one forward and backward pass, and the bytes saved in between."""

    forward: list[Operation] = field(default_factory=list)
    backward: list[Operation] = field(default_factory=list)
    saved_bytes: int = 0

    @property
    def operations(self) -> list[Operation]:
        return self.forward + self.backward

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.operations)

    @property
    def bytes(self) -> int:
        return sum(op.bytes for op in self.operations)


class OperationCounter(TorchDispatchMode):
    """A dispatch mode that fills ``operations``. ``compute=False``: large results stay empty."""

    def __init__(self, *, compute: bool = True) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._compute = compute

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket.__name__
        if packet == "gemm_4bit":
            with self:
                return _decode_and_multiply(*args, **kwargs)
        launches = not (func.is_view or packet in _NO_LAUNCH)
        if launches and not self._compute and _bytes(tree_leaves((args, kwargs))) > _SMALL:
            result = _uncomputed(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        if launches:
            read = [] if packet in ("zeros", "zero_", "fill_") else [*tree_leaves((args, kwargs))]
            if packet in ("addmm", "addmm_") and kwargs.get("beta") == 0:
                read = read[1:]
            flops, written = _product_flops(packet, args), _bytes(tree_leaves(result))
            added_to = 0
            if packet in ("addmm", "addmm_") and kwargs.get("beta") != 0:
                added_to = min(written, _distinct_bytes(args[0]))
            self.operations.append(
                Operation(str(func.name()), flops, _bytes(read), written, added_to=added_to)
            )
        return result

    def add(
        self, name: str, flops: int, read: int, written: int, tile: GemmConfig | None = None
    ) -> None:
        """Count a launch that is not a PyTorch operation."""
        self.operations.append(Operation(name, flops, read, written, tile=tile))


def _bytes(values: Iterable[Any]) -> int:
    return sum(_distinct_bytes(value) for value in values if isinstance(value, Tensor))


def _distinct_bytes(tensor: Tensor) -> int:
    """Bytes of its elements; those that an expanded tensor repeats count once."""
    count = tensor.dtype.itemsize
    for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= extent if stride else min(extent, 1)
    return count


def _product_flops(packet: str, args: tuple[Any, ...]) -> int:
    if packet in ("mm", "bmm"):
        return 2 * args[0].numel() * int(args[1].shape[-1])
    if packet == "linear":
        return 2 * args[0].numel() * int(args[1].shape[0])
    if packet in ("addmm", "addmm_"):
        return 2 * args[1].numel() * int(args[2].shape[-1])
    return 0


def _uncomputed(func: Any, args: Any, kwargs: Any) -> Any:
    """The result in shape, dtype and strides; arguments that are written to, as they were."""
    if func._schema.is_mutable:
        return args[0]
    to_meta = [tree_map(_on_meta, part) for part in (args, kwargs)]
    return tree_map(_in_memory, func(*to_meta[0], **to_meta[1]))


def _on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return torch.device("meta") if isinstance(value, torch.device) else value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _in_memory(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


def _decode_and_multiply(*args: Any, **kwargs: Any) -> Tensor:
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

    result: Tensor = _gemm_4bit_default_impl(*args, **kwargs)
    return result


@contextlib.contextmanager
def dropout_as_on_cuda() -> Iterator[None]:
    """PyTorch drops in one operation on CUDA, in three elsewhere."""

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p > 0.0 else x

    with mock.patch("torch.nn.functional.dropout", dropout):
        yield
