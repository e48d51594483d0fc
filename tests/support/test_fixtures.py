"""The fixtures of conftest.py: poisoned memory, fixed seeds, and kernels on every machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pins import PINS

from bench.instruments.accuracy import assert_same_bits
from tests import conftest
from tests.ptx_executor import GlobalRace

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_python_allocation_of_floats_is_nan(dtype: torch.dtype) -> None:
    like = torch.zeros(3, 4).to(dtype)
    for tensor in (
        torch.empty(3, 4, dtype=dtype),
        torch.empty_like(like),
        torch.empty_strided((3, 4), (1, 3), dtype=dtype),
        torch.empty_permuted((3, 4), (1, 0), dtype=dtype),
        like.new_empty(3, 4),
        like.new_empty_strided((3, 4), (4, 1)),
        torch.empty(3, 4, dtype=dtype).t(),
    ):
        assert tensor.float().isnan().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_integers_are_poisoned_with_a_pattern(dtype: torch.dtype) -> None:
    assert torch.empty(4, dtype=dtype).view(torch.uint8).eq(0x5A).all()


def test_allocations_keep_their_meaning() -> None:
    assert torch.empty(2, 3, device="meta").shape == (2, 3)
    assert torch.empty(2, requires_grad=True).requires_grad
    assert torch.empty(0).numel() == 0
    assert torch.zeros(2).eq(0).all()
    assert torch.nn.Linear(2, 2).weight.isfinite().all()


def test_allocations_obey_a_device_context() -> None:
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"


@pytest.mark.parametrize("order", ["first", "second"])
def test_the_seed_is_fixed_per_test(order: str) -> None:
    fresh = torch.Generator().manual_seed(0)
    assert torch.equal(torch.randn(4), torch.randn(4, generator=fresh)), order


@pytest.mark.parametrize("version", [PINS["triton"], "3.5.1"])
def test_limits_of_machine_code_are_those_of_one_compiler(version, monkeypatch, request) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    monkeypatch.setattr(conftest, "INTERPRETED", False)
    request.node.add_marker(pytest.mark.pinned)
    expected = None if version == PINS["triton"] else "its limits hold for triton " + PINS["triton"]
    assert conftest._reason_to_skip(request.node) == expected


@triton.jit
def _add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask)
    y = tl.load(y_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, x + y, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_kernel_runs_unchanged_on_every_machine(executor: Any, dtype: torch.dtype) -> None:
    x, y = (torch.randn(300, device=executor.device).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    with executor.counting_launches() as launches:
        _add_kernel[(3,)](x, y, out, 300, BLOCK=128)
    assert_same_bits(out, x + y, name=executor.name)
    assert launches == ["_add_kernel"]


@triton.jit
def _ticket_kernel(counter_ptr, order_ptr):
    ticket = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    tl.store(order_ptr + ticket, tl.program_id(0))


def test_options_hold_for_a_block_and_are_given_back(ptx_executor: Any) -> None:
    def order() -> list[int]:
        counter, result = torch.zeros(1, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
        _ticket_kernel[(4,)](counter, result)
        return result.tolist()

    assert order() == [0, 1, 2, 3]
    with ptx_executor.with_options(schedule="reverse", resident=1):
        assert order() == [3, 2, 1, 0]
    assert order() == [0, 1, 2, 3]


@triton.jit
def _racing_kernel(value_ptr, out_ptr):
    pid = tl.program_id(0)
    if pid == 0:
        tl.store(value_ptr, 1)
    else:
        tl.store(out_ptr, tl.load(value_ptr))


def test_races_between_programs_are_reported(ptx_executor: Any) -> None:
    value, out = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(GlobalRace, match="argument value_ptr"):
        _racing_kernel[(2,)](value, out)
