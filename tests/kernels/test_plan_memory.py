"""Memory in launch plans: what Inductor's functions give is what PyTorch's give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.offline
SHAPES = [(), (7,), (3, 5), (2, 0, 4)]


@pytest.fixture(params=["with Inductor's functions", "without"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    from lora_fast.kernels import plan_memory

    assert plan_memory._INDUCTORS is not None
    if request.param == "without":
        monkeypatch.setattr(plan_memory, "_INDUCTORS", None)
    return plan_memory


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_allocations(memory: Any, device: str, shape: tuple[int, ...]) -> None:
    expected = torch.empty(shape, dtype=torch.bfloat16, device=device)
    assert memory.contiguous(shape) == expected.stride()
    there = torch.device(device)
    made = memory.allocator(there)(shape, memory.contiguous(shape), torch.bfloat16)
    assert (made.shape, made.stride(), made.dtype, made.device) == (
        expected.shape,
        expected.stride(),
        expected.dtype,
        there,
    )
    with torch.inference_mode():
        made = memory.allocator(there)(shape, memory.contiguous(shape), torch.bfloat16)
    assert made.is_inference()


def test_views(memory: Any) -> None:
    """Of a tensor that does not start where its memory does, and that requires a gradient."""
    whole = torch.arange(40.0)
    part = whole[8:].requires_grad_()
    with torch.no_grad():
        found: Tensor = memory.view()(part, (2, 3), (5, 1), 4)
    assert found.tolist() == [[12.0, 13.0, 14.0], [17.0, 18.0, 19.0]]
    assert found.data_ptr() == whole[12:].data_ptr()
    assert not found.requires_grad
    there = memory.address(part, 16, (2, 3), (5, 1))
    assert there.data_ptr() == found.data_ptr() and there.base is part
