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


X, W, A, B = torch.randn(3, 6), torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)


@pytest.mark.parametrize(
    ("kind", "message", "kwargs"),
    [
        (TypeError, "x must be a torch.Tensor, got list", {"x": [1.0]}),
        (TypeError, "x must be float64", {"x": torch.ones(3, 6, dtype=torch.int32)}),
        (ValueError, "x must have K = 6 features", {"x": torch.randn(3, 7)}),
        (ValueError, "x must have at least one dimension", {"x": torch.tensor(1.0)}),
        (ValueError, r"weight must have shape \[N, K\]", {"weight": torch.randn(5, 6, 1)}),
        (TypeError, "weight must be a torch.Tensor, got NoneType", {"weight": None}),
        (ValueError, "B must be given when A is", {"B": None}),
        (ValueError, "A must be given when B is", {"A": None}),
        (ValueError, r"A must have shape \[R, K\] with K = 6", {"A": torch.randn(2, 5)}),
        (ValueError, "A must have rank R ≥ 1", {"A": torch.randn(0, 6), "B": torch.randn(5, 0)}),
        (ValueError, r"B must have shape \[N, R\] = \(5, 2\)", {"B": torch.randn(2, 5)}),
        (ValueError, r"bias must have shape \(5,\)", {"bias": torch.randn(6)}),
        (ValueError, r"d must have shape \(2,\)", {"d": torch.randn(5)}),
        (ValueError, "d must be None when there is no adapter", {"A": None, "B": None, "d": A[0]}),
        (TypeError, "g must be a torch.Tensor, got float", {"g": 1.0}),
        (ValueError, "scaling must be finite, got nan", {"scaling": float("nan")}),
        (ValueError, "scaling must be finite, got inf", {"scaling": float("inf")}),
        (ValueError, "scaling must be one number", {"scaling": torch.ones(2)}),
        (TypeError, "scaling must be a number, got str", {"scaling": "1"}),
        (ValueError, r"dropout_p must lie in \[0, 1\], got 1.5", {"dropout_p": 1.5}),
        (
            ValueError,
            "b must be None when there is no adapter",
            {"A": None, "B": None, "b": W[:, 0]},
        ),
        (TypeError, "dropout_seed must be an integer, got float", {"dropout_seed": 1.5}),
        (ValueError, "dropout_seed must lie in", {"dropout_seed": -1}),
        (
            TypeError,
            "dropout_seed must be an integer or one int64",
            {"dropout_seed": torch.ones(1)},
        ),
        (
            TypeError,
            "dropout_seed must be an integer or one int64",
            {"dropout_seed": torch.tensor([1, 2])},
        ),
        (
            ValueError,
            "dropout_seed must be on x's device",
            {"dropout_seed": torch.ones(1, dtype=torch.int64, device="meta")},
        ),
        (ValueError, "weight must have N ≥ 1 and K ≥ 1", {"x": X[:, :0], "weight": W[:, :0]}),
        (TypeError, "dropout_p must be a number", {"dropout_p": "0.1"}),
        (ValueError, "x must be on a device that computes, got meta", {"x": X.to("meta")}),
        (ValueError, "weight must be on x's device cpu, got meta", {"weight": W.to("meta")}),
        (ValueError, "A must be on x's device cpu, got meta", {"A": A.to("meta")}),
    ],
)
def test_bad_input_is_named(kind, message, kwargs):
    arguments = {**{"x": X, "weight": W, "bias": None, "A": A, "B": B}, **kwargs}
    with pytest.raises(kind, match=message):
        adapted_linear(**arguments)
