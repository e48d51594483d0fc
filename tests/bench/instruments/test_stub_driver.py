"""The stub driver and the resources that are read from what it compiles, on two small kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime.driver import driver as triton_driver  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from bench.instruments import resources, stub_driver  # noqa: E402

pytestmark = pytest.mark.offline

NVIDIA = [arch for arch in resources.LIMITS if isinstance(arch, int)]
AMD = [arch for arch in resources.LIMITS if isinstance(arch, str)]


@triton.jit
def add_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask) + 1.0, mask=mask)


@triton.jit
def matmul_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_m[:, None] * K + offs_k[None, :])
        w = tl.load(w_ptr + offs_n[None, :] * K + offs_k[:, None])
        acc = tl.dot(x, w, acc)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty))


def _matmul(M: int, N: int, K: int, **options: Any) -> torch.Tensor:
    x, w = (torch.empty(n, K, dtype=torch.bfloat16, device="meta") for n in (M, N))
    y = torch.empty(M, N, dtype=torch.bfloat16, device="meta")
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, **options}
    grid = (triton.cdiv(M, blocks["BLOCK_M"]), triton.cdiv(N, blocks["BLOCK_N"]))
    matmul_kernel[grid](x, w, y, M, N, K, **blocks)
    return y


def _compiled(arch: int | str, launch: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with stub_driver.recording(arch) as log:
        launch(*args, **options)
    (kernel,) = log.kernels
    return kernel


def test_launches_are_recorded_with_grid_arguments_and_constants() -> None:
    with stub_driver.recording(90) as log:
        _matmul(8192, 14336, 4096, num_stages=3)
        _matmul(8192, 14336, 4096, num_stages=3)
    assert log.names == ["matmul_kernel", "matmul_kernel"]
    assert len(log.kernels) == 1
    launch = log.launches[0]
    assert launch.grid == (64, 112, 1)
    assert launch.num_programs == 64 * 112
    assert launch.constexprs == {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}
    assert (launch.kernel.num_warps, launch.kernel.num_stages) == (8, 3)
    assert (launch.arguments["M"], launch.arguments["K"]) == (8192, 4096)
    weight = launch.arguments["w_ptr"]
    assert (weight.shape, weight.stride, weight.dtype) == ((14336, 4096), (4096, 1), torch.bfloat16)
    assert weight.nbytes == 14336 * 4096 * 2
    assert ".target sm_90a" in launch.kernel.text("ptx")


def test_an_argument_of_one_becomes_a_constant_as_on_a_device() -> None:
    x = torch.empty(1, device="meta")
    with stub_driver.recording(80) as log:
        add_kernel[(1,)](x, x, 1, BLOCK=128)
    assert log.launches[0].constexprs == {"n": 1, "BLOCK": 128}
    assert set(log.launches[0].arguments) == {"x_ptr", "y_ptr"}


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_alignment_is_that_of_a_real_allocation(offset: int) -> None:
    base = torch.empty(1024, dtype=torch.bfloat16, device="meta")
    with stub_driver.recording(80) as log:
        add_kernel[(4,)](base[offset:], base, 512, BLOCK=128)
    arguments = log.launches[0].arguments
    assert arguments["x_ptr"].divisible_by_16 == (offset % 8 == 0)
    assert arguments["y_ptr"].divisible_by_16


def test_an_empty_grid_launches_nothing() -> None:
    x = torch.empty(0, device="meta")
    with stub_driver.recording(80) as log:
        add_kernel[(0,)](x, x, 0, BLOCK=128)
    assert log.launches == []


def test_tensors_with_memory_are_recorded_too_and_left_alone() -> None:
    x, y = torch.ones(256), torch.zeros(256)
    with stub_driver.recording(80) as log:
        add_kernel[(2,)](x, y, 256, BLOCK=128)
    assert log.launches[0].arguments["x_ptr"].shape == (256,)
    assert y.eq(0).all()


def test_the_previous_driver_is_back_afterwards() -> None:
    before = triton_driver._active
    with pytest.raises(KeyError), stub_driver.recording(90):
        assert triton_driver.active.get_current_target().arch == 90
        raise KeyError
    assert triton_driver._active is before


def test_too_much_shared_memory_raises_as_on_the_device() -> None:
    options = {"BLOCK_K": 64, "num_stages": 5}
    assert _compiled(90, _matmul, 256, 256, 4096, **options).shared_bytes > 99 * 1024
    with stub_driver.recording(89) as log, pytest.raises(OutOfResources, match="shared memory"):
        _matmul(256, 256, 4096, **options)
    assert log.launches == []


@pytest.mark.parametrize("arch", NVIDIA)
def test_the_hot_loop_uses_the_tensor_cores_of_its_generation(arch: int) -> None:
    kernel = _compiled(arch, _matmul, 512, 512, 512, num_stages=3)
    found = kernel.resources
    limits = resources.limits_of(arch)
    assert set(found.hot_loop.mma) == set(found.mma) == {limits.mma}
    assert len(found.hot_loops) == 1
    assert found.hot_loop.by_class["local"] == 0
    assert found.local_bytes == 0
    assert 0 < found.shared_bytes <= limits.shared_per_block
    assert 0 < found.registers <= 255
    assert found.ctas_per_sm >= 1


def test_a_longer_tile_puts_proportionally_more_products_into_the_loop() -> None:
    short, long = (
        _compiled(80, _matmul, 512, 512, 512, num_stages=2, BLOCK_K=block).resources
        for block in (32, 64)
    )
    assert long.hot_loop.mma["HMMA"] == 2 * short.hot_loop.mma["HMMA"] == 64


@pytest.mark.parametrize("arch", [80, 90])
def test_spills_are_seen(arch: int) -> None:
    # 128 × 256 accumulators in 128 threads are 256 registers each, more than there are.
    found = _compiled(arch, _matmul, 512, 512, 512, BLOCK_N=256, num_warps=4).resources
    assert found.local_bytes > 0


@pytest.mark.parametrize("arch", AMD)
def test_amd_targets_compile(arch: str) -> None:
    kernel = _compiled(arch, _matmul, 512, 512, 512, num_stages=2)
    assert kernel.target.backend == "hip"
    assert set(kernel.resources.mma) == {resources.limits_of(arch).mma}
    assert kernel.resources.local_bytes == 0
    assert kernel.resources.registers > 0


def test_a_kernel_without_products_has_no_hot_loop() -> None:
    x = torch.empty(1024, device="meta")
    kernel = _compiled(90, add_kernel[(8,)], x, x, 1024, BLOCK=128)
    assert not kernel.resources.mma
    assert kernel.resources.instructions["global"] >= 2
    with pytest.raises(ValueError, match="no loop"):
        _ = kernel.resources.hot_loop


def test_an_unknown_stage_is_refused() -> None:
    x = torch.empty(1024, device="meta")
    kernel = _compiled(90, add_kernel[(8,)], x, x, 1024, BLOCK=128)
    with pytest.raises(ValueError, match=r"stage must be one of .* got 'sass'"):
        kernel.text("sass")
