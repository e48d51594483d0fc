"""Both kinds of CPU, whichever this one is: those with AVX512-BF16, and those without.

    packed   bitsandbytes repacks the 4-bit weights of layers that it runs itself in eval mode, and
             PyTorch multiplies bfloat16 natively
    plain    neither

On a CPU without the instructions weights are packed as well, but bitsandbytes' product of packed
weights, which needs them, is replaced by PyTorch's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from machines import multiplying
from torch import Tensor

KINDS = ("plain", "packed")
# Of a process that pytest has not started: the kind that its parent was told to force.
VARIABLE = "LORA_FAST_TEST_CPU_KIND"
_for_good = ExitStack()


def bitsandbytes_packs() -> bool:
    """Whether this version of it packs weights on a CPU that has what it takes (0.48 does not)."""
    from bitsandbytes.nn import modules

    return hasattr(modules, "has_avx512bf16")


def has_packed_product() -> bool:
    """Whether this CPU has what bitsandbytes' product of packed weights is made of."""
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


@contextmanager
def forced(kind: str, *, product: bool | None = None) -> Iterator[None]:
    """Make this a CPU of `kind` for layers that are made in the block, and for our own products.

    `product`: whether bitsandbytes' packed product may be called; by default where it can be.
    """
    import bitsandbytes.functional as bnbf
    from bitsandbytes.nn import modules

    packs = {"plain": False, "packed": True}[kind]
    native = (torch.bfloat16,) if packs else ()
    with pytest.MonkeyPatch.context() as patch, multiplying(native):
        if bitsandbytes_packs():
            if packs and not (has_packed_product() if product is None else product):
                patch.setattr(bnbf, "gemv_4bit", _packed_product)
            patch.setattr(modules, "has_avx512bf16", lambda: packs)
        yield


def force_for_good() -> None:
    """Go on as the kind of CPU that the parent of this process was told to force, if it was."""
    if VARIABLE in os.environ:
        _for_good.enter_context(forced(os.environ[VARIABLE]))


def _packed_product(
    A: Tensor, B: Tensor, out: Tensor | None = None, *, state: Any, **_: Any
) -> Tensor:
    """x Wᵀ of a packed W, in bfloat16 as bitsandbytes': from its codes and its absmax."""
    from four_bit_formula import formula

    from lora_fast.four_bit.layout import plain_bytes, plain_state

    assert out is None and state.packing_format_for_cpu
    W = formula(plain_bytes(B.data, state), plain_state(state), torch.bfloat16)
    return torch.nn.functional.linear(A.bfloat16(), W).to(A.dtype)
