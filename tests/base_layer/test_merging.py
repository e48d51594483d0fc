"""Merging adapters into a weight and unmerging them, within the bounds of base_layer.merging."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lora_models import nf4_linear
from torch import Tensor, nn

from bench.instruments.accuracy import assert_same_bits
from lora_fast import LoRALinear, NF4Weight
from lora_fast.backends.torch_ops import TorchBackend
from lora_fast.base_layer.merging import (
    LowRank,
    Subtraction,
    merge,
    merged_linear,
    overwrite_four_bit,
)

K, N = 48, 32
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def _terms(dtype: torch.dtype = F32, scale: float = 0.1) -> list[LowRank]:
    """Two adapters of different ranks, scalings and factors, one scaling a tensor."""
    first = LowRank(torch.randn(5, K).to(dtype), (scale * torch.randn(N, 5)).to(dtype), 0.75)
    second = LowRank(
        torch.randn(3, K), scale * torch.randn(N, 3), torch.tensor(1.5), torch.randn(N),
        torch.randn(3),
    )  # fmt: skip
    return [first, second]


def _linear(dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(K, N).to(dtype)


def _gain() -> Tensor:
    return torch.randn(N) + 2 * torch.randint(0, 2, (N,)) - 1


def _delta(terms: list[LowRank], magnitude: bool = False) -> Tensor:
    """Σ s (b ⊙ (B d)) A in float64, or the same sum of magnitudes."""
    total = torch.zeros(N, K, dtype=F64)
    for t in terms:
        B = t.B.double() if t.d is None else t.B.double() * t.d.double()
        B = t.scaling * (B if t.b is None else B * t.b.double()[:, None])
        total += (B.abs() @ t.A.double().abs()) if magnitude else B @ t.A.double()
    return total


def _exact(weight: Tensor, terms: list[LowRank], g: Tensor | None) -> Tensor:
    total = weight.double() + _delta(terms)
    return total if g is None else total * g.double()[:, None]


def _bound(weight: Tensor, terms: list[LowRank], g: Tensor | None) -> Tensor:
    """The bound of the module's docstring, for a dense weight."""
    info = torch.finfo(weight.dtype)
    rank = sum(t.A.shape[0] for t in terms)
    gamma = (rank + 4) * (2.0**-53 if weight.dtype == F64 else 2.0**-24)
    sums = weight.double().abs() + _delta(terms, magnitude=True)
    sums = sums if g is None else sums * g.double().abs()[:, None]
    smallest = info.smallest_normal * info.eps / 2
    return info.eps / 2 * _exact(weight, terms, g).abs() + gamma * sums + smallest


@pytest.mark.parametrize("gain", [False, True], ids=["plain", "gain"])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "in place"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_dense_is_within_the_stated_bound(dtype: torch.dtype, keep: bool, gain: bool) -> None:
    base, terms, g = _linear(dtype), _terms(), _gain() if gain else None
    weight, before = base.weight, base.weight.detach().clone()
    merge(base, terms, g=g, keep=keep)
    assert (base.weight is weight) is (not keep and not gain)
    merged, bound = base.weight.detach(), _bound(before, terms, g)
    error = (merged.double() - _exact(before, terms, g)).abs()
    assert (error <= bound).all()

    x = torch.randn(7, K, dtype=F64)
    outputs = x @ merged.double().T - x @ _exact(before, terms, g).T
    assert (outputs.abs() <= x.abs() @ bound.T).all()


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_a_kept_weight_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    base = _linear(dtype)
    weight, before = base.weight, base.weight.detach().clone()
    undo = merge(base, _terms(), g=_gain())
    assert_same_bits(weight.detach(), before, name="W")
    undo.restore(base)
    assert base.weight is weight
    assert_same_bits(base.weight.detach(), before, name="unmerged")


def _ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(values.abs().clamp_min(info.smallest_normal)))
    return info.eps * torch.exp2(exponent)


def _ulps(actual: Tensor, before: Tensor, terms: list[LowRank]) -> float:
    """max|actual − before| in ulps at the magnitude of the larger of W and W + Δ."""
    larger = torch.maximum(before.double().abs(), _exact(before, terms, None).abs())
    error = (actual.detach().double() - before.double()).abs()
    return float((error / _ulp(larger, before.dtype)).max())


@pytest.mark.parametrize("scale", [1e-4, 0.1, 3.0])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_subtracting_is_exact_to_one_ulp(dtype: torch.dtype, scale: float) -> None:
    base, terms = _linear(dtype), _terms(scale=scale)
    weight, before = base.weight, base.weight.detach().clone()
    undo = merge(base, terms, keep=False)
    for term in terms:
        term.A.zero_()  # a later change of the adapter must not matter
    assert isinstance(undo, Subtraction)
    undo.restore(base)
    assert base.weight is weight
    assert _ulps(weight, before, list(undo.terms)) <= 1


def _requantised(base: Any, blocksize: int) -> None:
    weight = base.weight
    base.weight = type(weight)(
        NF4Weight.from_params4bit(weight).dequantize(BF16),
        quant_type=weight.quant_state.quant_type,
        blocksize=blocksize,
        compress_statistics=weight.compress_statistics,
        quant_storage=weight.quant_storage,
    ).to("cpu")


STORAGES = [(torch.uint8, "nf4"), (torch.bfloat16, "fp4")]


def _assert_four_bits_of(weight: Any, dense: Tensor) -> None:
    """`weight` is `dense`, to half the widest gap between codes and the error of its absmax."""
    actual = NF4Weight.from_params4bit(weight)
    blocks = dense.double().reshape(-1, actual.blocksize)
    largest = blocks.abs().amax(1)
    widest = {"nf4": 0.152, "fp4": 0.167}[actual.quant_type]
    allowed = widest * largest + (actual.absmax().double() - largest).abs()
    error = actual.dequantize(F64).reshape(blocks.shape) - blocks
    assert (error.abs() <= allowed[:, None] * (1 + 1e-6)).all()
    assert (actual.absmax() / largest - 1).abs().max() < 0.05


@pytest.mark.usefixtures("cpu_kind")
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize(("storage", "kind"), STORAGES, ids=str)
def test_four_bits_keep_their_format(
    blocksize: int, nested: bool, storage: torch.dtype, kind: str
) -> None:
    options = {"compress_statistics": nested, "quant_storage": storage, "quant_type": kind}
    base: Any = nf4_linear(_linear(BF16), BF16, **options)
    if blocksize != 64:
        _requantised(base, blocksize)
    weight, packed = base.weight, base.weight.data.view(torch.uint8).clone()
    wide, terms = NF4Weight.from_params4bit(weight).dequantize(F32), _terms()
    undo = merge(base, terms, keep=False)
    assert torch.equal(weight.data.view(torch.uint8), packed)

    state, expected = base.weight.quant_state, weight.quant_state
    assert base.quant_state is state
    for name in ("blocksize", "nested", "dtype", "quant_type", "shape"):
        assert getattr(state, name) == getattr(expected, name), name
    assert state.blocksize == blocksize
    assert (base.weight.dtype, base.weight.shape) == (storage, weight.shape)
    _assert_four_bits_of(base.weight, _exact(wide, terms, None))

    undo.restore(base)
    assert base.weight is weight and base.quant_state is expected


@pytest.mark.usefixtures("cpu_kind")
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize(("storage", "kind"), STORAGES, ids=str)
def test_four_bits_are_overwritten_in_their_storage(
    nested: bool, storage: torch.dtype, kind: str
) -> None:
    options = {"compress_statistics": nested, "quant_storage": storage, "quant_type": kind}
    base = nf4_linear(_linear(BF16), BF16, **options)
    weight, state = base.weight, base.weight.quant_state
    pointers = weight.data_ptr(), state.absmax.data_ptr()
    dense = torch.randn(N, K)
    overwrite_four_bit(weight, dense)
    assert pointers == (weight.data_ptr(), state.absmax.data_ptr())
    fresh = NF4Weight.from_dense(dense, double_quant=nested, quant_type=kind).dequantize(F32)
    assert_same_bits(NF4Weight.from_params4bit(weight).dequantize(F32), fresh, name="W")


@pytest.mark.parametrize("dtype", [None, F32, F16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_dense_layer_on_request(kind: str, dtype: torch.dtype | None) -> None:
    base: Any = _linear(BF16).eval()
    base = nf4_linear(base, BF16).eval() if kind == "nf4" else base
    weight, terms, g = base.weight, _terms(), _gain()
    wide = NF4Weight.from_params4bit(weight).dequantize(F32) if kind == "nf4" else weight.detach()
    linear = merged_linear(base, terms, g=g, dtype=dtype)
    assert type(linear) is nn.Linear and linear.bias is base.bias and not linear.training
    assert base.weight is weight
    merged = linear.weight.detach()
    assert merged.dtype == (dtype or BF16) and not linear.weight.requires_grad
    error = (merged.double() - _exact(wide, terms, g)).abs()
    assert (error <= _bound(wide.to(F32), terms, g) + _bound(merged, [], None)).all()


@pytest.mark.parametrize("keep", [True, False])
def test_tied_weights(keep: bool) -> None:
    base, tied = _linear(F32), _linear(F32)
    tied.weight = base.weight
    before = tied.weight.detach().clone()
    undo = merge(base, _terms(), keep=keep)
    assert torch.equal(tied.weight, before) is keep
    undo.restore(base)
    assert tied.weight is base.weight
    torch.testing.assert_close(tied.weight.detach(), before)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_refused(
    kind: str, keep: bool, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_fast.base_layer.merging._TRIAL_ELEMENTS", 5 * K)
    base: Any = _linear(F32)
    base = nf4_linear(base) if kind == "nf4" else base
    weight, terms, before = base.weight, _terms(), base.weight.detach().clone()
    terms[0].B[30, 4] = value
    with pytest.raises(ValueError, match="merged weight must be finite"):
        merge(base, terms, keep=keep)
    assert base.weight is weight and torch.equal(base.weight.detach(), before)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_overflow_of_the_weights_dtype_is_refused(kind: str, keep: bool) -> None:
    base: Any = _linear(F16)
    base = nf4_linear(base, F16) if kind == "nf4" else base
    with pytest.raises(ValueError, match=r"must be finite in torch.float16"):
        merge(base, _terms(scale=1e6), keep=keep)


def test_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many adapters, the weight is read and written once."""
    calls: list[dict[str, Any]] = []
    update = TorchBackend.update_weight
    monkeypatch.setattr(
        TorchBackend, "update_weight", lambda *args, **kw: (calls.append(kw), update(*args, **kw))
    )
    merge(_linear(BF16), _terms(), g=_gain())
    (call,) = calls
    assert call["A"].shape == (8, K) and call["A"].dtype == call["B"].dtype == F32


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "in place"])
def test_one_launch(typical_executor: Any, keep: bool) -> None:
    base, terms = _linear(BF16).to(typical_executor.device), _terms()
    terms = [term.copy(typical_executor.device) for term in terms]
    before = base.weight.detach().clone()
    with typical_executor.counting_launches() as names:
        undo = merge(base, terms, keep=keep)
    # In place, the sum is checked before W is overwritten.
    assert names == ["weight_update"] * (1 if keep else 2)
    terms = [term.copy(torch.device("cpu")) for term in terms]
    error = (base.weight.detach().cpu().double() - _exact(before.cpu(), terms, None)).abs()
    assert (error <= _bound(before.cpu(), terms, None)).all()
    undo.restore(base)
    assert _ulps(base.weight.cpu(), before.cpu(), terms) <= 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("A", torch.zeros(5, K + 1), r"A must have shape \(5, 48\), got \(5, 49\)"),
        ("B", torch.zeros(N, 4), r"B must have shape \(32, 5\), got \(32, 4\)"),
        ("b", torch.zeros(5), r"b must have shape \(32,\), got \(5,\)"),
        ("d", torch.zeros(N), r"d must have shape \(5,\), got \(32,\)"),
        ("B", torch.zeros(N, 5, device="meta"), "B must be on the weight's device cpu, got meta"),
    ],
)
def test_factors_that_do_not_fit(name: str, value: Tensor, message: str) -> None:
    factors = {"A": torch.zeros(5, K), "B": torch.zeros(N, 5), name: value}
    with pytest.raises(ValueError, match=message):
        merge(_linear(F32), [LowRank(**factors)])
    with pytest.raises(ValueError, match=r"g must have shape \(32,\)"):
        merge(_linear(F32), [], g=torch.ones(3))


def _adapted(kind: str, dtype: torch.dtype) -> LoRALinear:
    base: Any = _linear(dtype)
    layer = LoRALinear.from_linear(nf4_linear(base, dtype) if kind == "nf4" else base, r=5)
    nn.init.normal_(layer.lora_B, std=0.02)
    return layer


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_a_layer_merges_in_place(dtype: torch.dtype) -> None:
    layer = _adapted("dense", dtype)
    weight, before = layer.base_layer.weight, layer.base_layer.weight.detach().clone()
    terms = [LowRank(layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling)]
    layer.merge(keep_weight=False)
    assert layer.merged and layer.base_layer.weight is weight
    error = (weight.detach().double() - _exact(before, terms, None)).abs()
    assert (error <= _bound(before, terms, None)).all()
    clone = copy.deepcopy(layer)
    clone.unmerge()
    assert _ulps(clone.base_layer.weight, before, terms) <= 1
    assert layer.merged and not clone.merged


def test_a_layer_becomes_dense_until_it_is_unmerged() -> None:
    layer = _adapted("nf4", BF16)
    base, x = layer.base_layer, torch.randn(4, K, dtype=BF16)
    y = layer(x).detach()
    layer.merge(dequantize=True)
    assert type(layer.base_layer) is nn.Linear and layer.base_layer.weight.dtype == BF16
    assert (layer(x) - y).norm() < 0.02 * y.norm()
    layer.unmerge()
    assert layer.base_layer is base
    assert torch.equal(layer(x).detach(), y)
