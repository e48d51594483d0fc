"""Counts the matrix products that run, from any caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm}


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _PRODUCTS:
            self.shapes.append(tuple(result.shape))
        return result


@contextmanager
def counting() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the products that run in the block."""
    with _Counting() as mode:
        yield mode.shapes


def products_of(call: Callable[[], Any]) -> int:
    """How many products `call` runs."""
    with counting() as shapes:
        call()
    return len(shapes)
