"""Warps of one CTA in different roles, tied together by mbarriers (sm_90, written in Gluon)."""

from __future__ import annotations

import re

import pytest
import torch
from pins import is_pinned

from tests import ptx_executor

gluon = pytest.importorskip("triton.experimental.gluon")
if not is_pinned("triton"):
    why = "Gluon is experimental: what compiles with one version does not with the next"
    pytest.skip(why, allow_module_level=True)
from ptx_mutants import mutants, ptx_of  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.language.nvidia.hopper import (  # noqa: E402
    fence_async_shared,
    mbarrier,
    tma,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: E402

pytestmark = pytest.mark.compiled


@gluon.jit
def _produce(x_desc, full, empty, buffer, row, n, BUFFERS: gl.constexpr):
    columns: gl.constexpr = x_desc.block_type.shape[1]
    for i in range(n):
        slot = i % BUFFERS
        mbarrier.wait(empty.index(slot), ((i // BUFFERS) & 1) ^ 1)
        mbarrier.expect(full.index(slot), x_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            x_desc, [row, i * columns], full.index(slot), buffer.index(slot)
        )


@gluon.jit
def _consume(y_desc, full, empty, buffer, out, row, n, BUFFERS: gl.constexpr, LAYOUT: gl.constexpr):
    columns: gl.constexpr = y_desc.block_type.shape[1]
    for i in range(n):
        slot = i % BUFFERS
        mbarrier.wait(full.index(slot), (i // BUFFERS) & 1)
        x = buffer.index(slot).load(LAYOUT)
        mbarrier.arrive(empty.index(slot), count=1)
        tma.store_wait(pendings=0)
        out.store(x * 2 + i)
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [row, i * columns], out)
    tma.store_wait(pendings=0)


@gluon.jit
def _specialised(x_desc, y_desc, n, BUFFERS: gl.constexpr, num_warps: gl.constexpr):
    """y = 2 x + number of the column block."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, num_warps], [1, 0])
    row = gl.program_id(0) * x_desc.block_type.shape[0]
    shape: gl.constexpr = [BUFFERS] + x_desc.block_type.shape  # noqa: RUF005
    buffer = gl.allocate_shared_memory(x_desc.dtype, shape, x_desc.layout)
    out = gl.allocate_shared_memory(y_desc.dtype, y_desc.block_type.shape, y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (_consume, (y_desc, full, empty, buffer, out, row, n, BUFFERS, layout)),
            (_produce, (x_desc, full, empty, buffer, row, n, BUFFERS)),
        ],
        [1],
        [24],
    )


def run() -> None:
    rows, columns, n = 16, 64, 5
    x = torch.randn(3 * rows, n * columns)
    y = torch.zeros_like(x)
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.float32)
    x_desc, y_desc = (TensorDescriptor.from_tensor(t, [rows, columns], layout) for t in (x, y))
    _specialised[(3,)](x_desc, y_desc, n, BUFFERS=2, num_warps=4)
    assert torch.equal(y, x * 2 + torch.arange(n * columns) // columns)


SYNCHRONISATION = re.compile(
    r"^[ \t]*((?:@%p\d+ )?(?:bar\.sync[ \t]+[^;]*;|mbarrier\.arrive[^;]*;|mbarrier\.try_wait[^;]*;"
    r"|cp\.async\.bulk\.wait_group[^;]*;))",
    re.M,
)


def test_warps_in_different_roles():
    ptx = ptx_of(run, 90)
    assert "setmaxnreg" in ptx and "brx.idx" in ptx
    unnoticed = []
    for statement, transform in mutants(ptx, SYNCHRONISATION):
        with ptx_executor.installed(90, transform=transform):
            try:
                run()
            except (ptx_executor.PTXError, AssertionError):
                continue
        unnoticed.append(statement)
    # The barrier at the very end of the consumer is redundant.
    assert len(unnoticed) <= 1 and all("bar.sync" in statement for statement in unnoticed)
