"""Operations under selective activation checkpointing (``context_fn`` of torch.utils.checkpoint).

Its policy is asked about every ATen call, and what it wants saved must not be written to. A fused
operation writes into results of its own, and is one operation: the policy is not asked about what
it consists of, and checkpointing recomputes it, as it does in a graph of torch.compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils import _python_dispatch as modes

Operation = TypeVar("Operation", bound=Callable[..., Any])
_HOME = "torch.utils.checkpoint"
are_modes_active = torch._C._len_torch_dispatch_stack


def is_observed() -> bool:
    """Whether a policy is asked about ATen calls."""
    return bool(are_modes_active()) and type(modes._get_current_dispatch_mode()).__module__ == _HOME


@contextmanager
def unobserved() -> Iterator[None]:
    """Ask no policy inside."""
    removed = []
    while is_observed():
        removed.append(modes._pop_mode())
    try:
        yield
    finally:
        for mode in reversed(removed):
            modes._push_mode(mode)


def as_one(operation: Operation) -> Operation:
    """`operation`, about whose parts no policy is asked."""

    @functools.wraps(operation)
    def called(*args: Any, **options: Any) -> Any:
        if not (are_modes_active() and is_observed()):
            return operation(*args, **options)
        with unobserved():
            return operation(*args, **options)

    return called  # type: ignore[return-value]
