"""Operands that the operation refuses, in addition to those of test_functional.py."""

from __future__ import annotations

import pytest
import torch

from lora_fast.functional import adapted_linear


def test_a_scaling_that_trains_is_refused_and_d_takes_its_place() -> None:
    x, W, A, B = torch.randn(2, 8), torch.randn(5, 8), torch.randn(3, 8), torch.randn(5, 3)
    scaling = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(ValueError, match=r"scaling must not require a gradient.*d = scaling"):
        adapted_linear(x, W, A=A, B=B, scaling=scaling)
    adapted_linear(x, W, A=A, B=B, d=scaling.expand(3)).sum().backward()
    expected = ((x @ A.T) @ B.T).sum()
    torch.testing.assert_close(scaling.grad, expected)
