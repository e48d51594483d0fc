"""Tensors that autograd saves: each storage once, and nothing that exists anyway."""

from __future__ import annotations

import pytest
import torch

from bench.instruments.saved_tensors import SavedTensors


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_storage_counts_once_and_parameters_never(device: str) -> None:
    x, w = (torch.ones(n, 4, device=device, requires_grad=True) for n in (8, 4))
    with SavedTensors([w]) as saved:
        y = (x @ w) * x.exp() + (x @ w.T)
    # x (once), x @ w and exp(x), which both exp and the product save
    assert saved.bytes == 3 * x.nbytes
    assert saved.shapes == [((8, 4), torch.float32)] * 3
    assert saved.elements(floating=True) == 3 * 8 * 4 and saved.elements(floating=False) == 0
    assert y.requires_grad


def test_released_memory_is_not_taken_for_another_tensor() -> None:
    x = torch.ones(64, 64, requires_grad=True)
    with SavedTensors([]) as saved:
        for _ in range(3):
            x.exp()
    assert len(saved.shapes) == 3
