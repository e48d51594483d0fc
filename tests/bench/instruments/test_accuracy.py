"""Tests of the test rule: wrong results must break it, honest rounding must not."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from bench.instruments.accuracy import (
    ORDER_DIFFERENCE,
    RMS_CEILING,
    assert_accurate,
    assert_agree,
    assert_all_accurate,
    assert_same_bits,
    orders,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _problem(dtype: torch.dtype) -> Problem:
    """x, W, bias of one linear in ``dtype`` and y = x Wᵀ + bias in float64."""
    x = torch.randn(48, 96).to(dtype)
    weight = (torch.randn(80, 96) / 96**0.5).to(dtype)
    bias = (torch.randn(80) / 4).to(dtype)
    return x, weight, bias, x.double() @ weight.double().T + bias.double()


def _eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
    return orders(lambda: torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_honest_rounding_passes(dtype: torch.dtype) -> None:
    x, weight, bias, ref = _problem(dtype)
    eager = _eager(x, weight, bias)
    assert_accurate(ref.to(dtype), ref, eager, name="y")
    for sample in eager:
        assert_accurate(sample, ref, eager, name="y")


@pytest.mark.parametrize("factor", [1.01, 0.99, -1.0, 0.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_scale_fails(dtype: torch.dtype, factor: float) -> None:
    x, weight, bias, ref = _problem(dtype)
    with pytest.raises(AssertionError, match=r"max\|error\|"):
        assert_accurate((ref * factor).to(dtype), ref, _eager(x, weight, bias), name="y")


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_scale_of_a_float32_gradient_of_16_bit_products_fails(dtype: torch.dtype) -> None:
    x, weight, bias, ref = _problem(dtype)
    eager = [sample.float() for sample in _eager(x, weight, bias)]
    honest = ref.to(dtype).float()
    assert_accurate(honest, ref, eager, name="dB", compute_dtype=dtype)
    with pytest.raises(AssertionError, match=r"1\.01"):
        assert_accurate(honest * 1.01, ref, eager, name="dB", compute_dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_bias_fails(dtype: torch.dtype) -> None:
    x, weight, bias, ref = _problem(dtype)
    without = x.double() @ weight.double().T
    with pytest.raises(AssertionError):
        assert_accurate(without.to(dtype), ref, _eager(x, weight, bias), name="y")


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_element_fails(dtype: torch.dtype) -> None:
    x, weight, bias, ref = _problem(dtype)
    actual = ref.to(dtype)
    actual[17, 3] += 0.5
    with pytest.raises(AssertionError, match=r"worst at \(17, 3\)"):
        assert_accurate(actual, ref, _eager(x, weight, bias), name="y")


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_element_fails_though_the_rms_is_allowed(dtype: torch.dtype) -> None:
    x, weight, bias, ref = _problem(dtype)
    eager = _eager(x, weight, bias)
    actual = ref.to(dtype)
    err_eager = max((sample - ref).abs().max() for sample in eager)
    actual[17, 3] += 4 * (err_eager + torch.finfo(dtype).eps * ref.abs().max())
    rms = (actual - ref).square().mean().sqrt() / ref.square().mean().sqrt()
    assert rms < RMS_CEILING[dtype]
    with pytest.raises(AssertionError, match=r"worst at \(17, 3\)"):
        assert_accurate(actual, ref, eager, name="y")


@pytest.mark.parametrize("dtype", DTYPES)
def test_missing_last_k_step_fails(dtype: torch.dtype) -> None:
    x, weight, bias, ref = _problem(dtype)
    short = x[:, :-1].double() @ weight[:, :-1].double().T + bias.double()
    with pytest.raises(AssertionError):
        assert_accurate(short.to(dtype), ref, _eager(x, weight, bias), name="y")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_fails(value: float) -> None:
    x, weight, bias, ref = _problem(torch.float32)
    actual = ref.float()
    actual[5, 7] = value
    with pytest.raises(AssertionError, match=r"1 of 3840 .* first at \(5, 7\)"):
        assert_accurate(actual, ref, _eager(x, weight, bias), name="y")


def test_wrong_shape_fails_even_where_it_broadcasts() -> None:
    ref = torch.ones(4, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(torch.ones(3), ref, torch.ones(4, 3), name="dbias")


def test_noise_above_the_rms_ceiling_fails_though_the_worst_element_is_allowed() -> None:
    ref = torch.randn(64, 64, dtype=torch.float64)
    eager = ref.bfloat16()
    eager[0, 0] += 1.0
    noisy = ref + 0.02 * torch.randn_like(ref)
    with pytest.raises(AssertionError, match="rms"):
        assert_accurate(noisy.bfloat16(), ref, eager, name="y")


def test_zero_reference_allows_only_what_eager_does() -> None:
    ref = torch.zeros(3, 3, dtype=torch.float64)
    assert_accurate(torch.zeros(3, 3), ref, torch.zeros(3, 3), name="dA")
    with pytest.raises(AssertionError):
        assert_accurate(torch.full((3, 3), 1e-30), ref, torch.zeros(3, 3), name="dA")


def test_empty_batch_passes_by_shape() -> None:
    ref = torch.empty(0, 7, dtype=torch.float64)
    assert_accurate(torch.empty(0, 7), ref, torch.empty(0, 7), name="y")


def test_unusable_yardsticks_are_refused() -> None:
    ref = torch.ones(2, dtype=torch.float64)
    plain = torch.ones(2)
    with pytest.raises(ValueError, match="ref64 must be float64"):
        assert_accurate(plain, plain, plain, name="y")
    with pytest.raises(ValueError, match="eager must be in a dtype under test"):
        assert_accurate(plain, ref, ref, name="y")
    with pytest.raises(ValueError, match="eager must be finite"):
        assert_accurate(plain, ref, plain * float("inf"), name="y")
    with pytest.raises(ValueError, match="eager must have the shape"):
        assert_accurate(plain, ref, torch.ones(1), name="y")
    with pytest.raises(ValueError, match="dtype must be one of"):
        assert_accurate(ref, ref, plain, name="y")
    with pytest.raises(ValueError, match="eager must hold at least one tensor"):
        assert_accurate(plain, ref, [], name="y")
    with pytest.raises(ValueError, match="eager must be finite"):
        assert_accurate(plain, ref, [plain, plain * float("nan")], name="y")


def test_all_reports_every_failure_and_missing_gradients() -> None:
    ref: dict[str, torch.Tensor | None] = {
        "y": torch.ones(2, dtype=torch.float64),
        "dA": torch.ones(2, dtype=torch.float64),
        "dW": None,
    }
    plain: dict[str, torch.Tensor | None] = {"y": torch.ones(2), "dA": torch.ones(2), "dW": None}
    assert_all_accurate(plain, ref, plain)
    with pytest.raises(AssertionError, match=r"dW: None in ref64 and eager alone"):
        assert_all_accurate({**plain, "dW": torch.ones(2)}, ref, plain)
    with pytest.raises(AssertionError, match=r"(?s)step\.y.*step\.dA: None in actual alone"):
        assert_all_accurate({**plain, "y": torch.ones(2) * 2, "dA": None}, ref, plain, name="step")
    with pytest.raises(AssertionError, match="keys differ"):
        assert_all_accurate({"y": torch.ones(2)}, ref, plain)


def test_same_bits_sees_the_sign_of_zero_and_one_ulp() -> None:
    value = torch.tensor([1.0, float("nan"), 0.0])
    assert_same_bits(value.clone(), value, name="y")
    with pytest.raises(AssertionError, match=r"first at \(2,\)"):
        assert_same_bits(torch.tensor([1.0, float("nan"), -0.0]), value, name="y")
    with pytest.raises(AssertionError, match=r"1 of 3 elements"):
        assert_same_bits(torch.tensor([1.0000001, float("nan"), 0.0]), value, name="y")
    with pytest.raises(AssertionError, match="dtype"):
        assert_same_bits(value.half(), value, name="y")


def _sums(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums of every kind: with and without bias, batched, with a vector, over rows; gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    x, weight, bias = leaves
    y = torch.nn.functional.linear(x, weight, bias)
    y.backward(y.detach())
    with torch.no_grad():
        return {
            "addmm": y.detach(),
            "mm": x @ weight.T,
            "bmm": x.view(4, 12, -1) @ weight.T.expand(4, -1, -1).contiguous(),
            "baddbmm": torch.baddbmm(bias, x.view(4, 12, -1), weight.T.expand(4, -1, -1)),
            "mv": x @ weight[0],
            "addmv": torch.addmv(x[:, 0], x, weight[0]),
            "dot": torch.dot(x.view(-1), x.flip(0).reshape(-1)),
            "sum": x.sum(),
            "sum over rows": x.view(6, 8, -1).sum((0, 1)),
            "norm": torch.linalg.vector_norm(x, dim=1),
            "dx": x.grad,
            "dweight": weight.grad,
            "dbias": bias.grad,
        }


def test_three_orders_round_differently_and_agree_otherwise() -> None:
    x, weight, bias, _ = _problem(torch.float32)
    exact = _sums(x.double(), weight.double(), bias.double())
    for name, samples in orders(lambda: _sums(x, weight, bias)).items():
        assert len(samples) == 3
        for sample in samples:
            assert_accurate(sample, exact[name], samples, name=name)
        distinct = {tuple(sample.flatten().tolist()) for sample in samples}
        # One number may well be the same in three orders.
        assert len(distinct) > 1 or samples[0].numel() == 1, name


def test_the_orders_see_the_same_random_numbers_and_leave_the_state_of_one_call() -> None:
    first, *others = orders(lambda: torch.rand(3))
    after = torch.rand(3)
    assert all(torch.equal(first, other) for other in others)
    torch.manual_seed(0)
    torch.rand(3)
    assert torch.equal(after, torch.rand(3))


def test_the_largest_error_of_the_orders_is_the_yardstick() -> None:
    """A result of one element, which plain PyTorch hits exactly in one order, by luck."""
    ref = torch.tensor([1.0], dtype=torch.float64)
    lucky, usual = torch.tensor([1.0]), torch.tensor([1.0 + 4e-6])
    actual = torch.tensor([1.0 - 4e-6])
    assert_accurate(actual, ref, [lucky, usual, lucky], name="dd")
    for eager in (lucky, [lucky] * 3):
        with pytest.raises(AssertionError, match=r"max\|error\|"):
            assert_accurate(actual, ref, eager, name="dd")
    with pytest.raises(AssertionError, match=r"max\|error\|"):
        assert_accurate(ref.float() * 1.01, ref, [lucky, usual, lucky], name="dd")


def test_ceilings_separate_one_percent_from_rounding() -> None:
    assert all(torch.finfo(d).eps / 4 < ceiling < 0.01 for d, ceiling in RMS_CEILING.items())


def test_tolerances_come_from_here() -> None:
    """No test has a number of its own for how wrong a result may be."""
    tests = Path(__file__).resolve().parents[2]
    literal = re.compile(r"\b(rtol|atol)=[\d.]+e?-?\d*\b(?! ?\*)")
    found = [
        f"{path.relative_to(tests)}: {line.strip()}"
        for path in tests.rglob("test_*.py")
        for line in path.read_text().splitlines()
        if literal.search(line) and "not torch.allclose" not in line
    ]
    # An optimizer that rounds to bfloat16: the bound is derived where it is used.
    assert [line.partition(":")[0] for line in found] == ["optim/test_lorafa.py"]


@pytest.mark.parametrize("scale", [1.01, 1.0 + 2 * ORDER_DIFFERENCE])
def test_a_difference_beyond_the_bound_is_seen(scale: float) -> None:
    value = torch.randn(50)
    assert_agree(value * (1 + ORDER_DIFFERENCE / 2), value, within=ORDER_DIFFERENCE)
    with pytest.raises(AssertionError, match="difference"):
        assert_agree(value * scale, value, within=ORDER_DIFFERENCE, name="x")
    with pytest.raises(AssertionError):
        assert_agree(value * math.nan, value, within=ORDER_DIFFERENCE)
