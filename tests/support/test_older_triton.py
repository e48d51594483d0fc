"""Kernels that Triton before 3.7 cannot compile are refused by a newer one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from bench.instruments import stub_driver

pytestmark = pytest.mark.offline


@triton.jit
def _pointer(ptr, ASKED: tl.constexpr):
    if ASKED:
        return ptr
    else:
        return None


@triton.jit
def _pair(ptr):
    return ptr, None


@triton.jit
def _nothing(ptr):
    return


@triton.jit
def returns_none(ptr):
    _pointer(ptr, False)


@triton.jit
def returns_a_tuple(ptr):
    _pair(ptr)


@triton.jit
def returns(ptr):
    _nothing(ptr)
    tl.store(_pointer(ptr, True), 1)


def test_none_is_not_returned():
    number = torch.zeros(1, dtype=torch.int32, device="meta")
    with stub_driver.recording(90):
        returns[(1,)](number)
        for kernel in (returns_none, returns_a_tuple):
            with pytest.raises(Exception, match=r"return|None"):
                kernel[(1,)](number)
