"""Register layouts of tcgen05.ld and st: the compiler's agree with each other (in Gluon)."""

from __future__ import annotations

import pytest
import torch
from pins import is_pinned

from tests import ptx_executor

gluon = pytest.importorskip("triton.experimental.gluon")
if not is_pinned("triton"):
    why = "Gluon is experimental: what compiles with one version does not with the next"
    pytest.skip(why, allow_module_level=True)
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.language.nvidia.blackwell import (  # noqa: E402
    TensorMemoryLayout,
    allocate_tensor_memory,
    get_tmem_reg_layout,
)

pytestmark = pytest.mark.compiled


@gluon.jit
def _through_tensor_memory(
    x_ptr, y_ptr, M: gl.constexpr, N: gl.constexpr,
    STORED: gl.constexpr, LOADED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    blocked: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [num_warps, 1], [1, 0])
    layout: gl.constexpr = TensorMemoryLayout([M, N], col_stride=1)
    rows = gl.arange(0, M, gl.SliceLayout(1, blocked))[:, None]
    offs = rows * N + gl.arange(0, N, gl.SliceLayout(0, blocked))[None, :]
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    memory = allocate_tensor_memory(dtype, [M, N], layout)
    stored: gl.constexpr = get_tmem_reg_layout(dtype, [M, N], layout, num_warps, STORED)
    loaded: gl.constexpr = get_tmem_reg_layout(dtype, [M, N], layout, num_warps, LOADED)
    memory.store(gl.convert_layout(gl.load(x_ptr + offs), stored))
    gl.barrier()
    gl.store(y_ptr + offs, gl.convert_layout(memory.load(loaded), blocked))


VARIANTS = ["32x32b", "16x64b", "16x128b", "16x256b", "32x32b_splitn"]


@pytest.mark.parametrize("M", [64, pytest.param(128, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_stored_one_way_is_loaded_another(variant, dtype, M):
    seen: list[str] = []
    with ptx_executor.installed(100, transform=lambda ptx: seen.append(ptx) or ptx):
        for stored, loaded in (("32x32b", variant), (variant, "32x32b")):
            x, y = torch.randn(M, 64).to(dtype), torch.zeros(M, 64, dtype=dtype)
            _through_tensor_memory[(1,)](x, y, M, 64, stored, loaded, num_warps=4)
            assert torch.equal(x, y)
    if variant.startswith("16x"):
        assert all(f".{variant}." in ptx for ptx in seen)
