"""The operation as users call it, on the torch backend: accuracy, autograd, bad input."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from equation import (
    FACTORS,
    Case,
    check,
    check_rows_keep_apart,
    eager,
    exact,
    fused,
    make,
    variations,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.instruments.accuracy import (
    ORDER_DIFFERENCE,
    assert_agree,
    assert_all_accurate,
    assert_same_bits,
)
from lora_fast import NF4Weight, functional, set_backend
from lora_fast.backends.torch_ops import TorchBackend
from lora_fast.operation.seeds import draw_seed

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BASE = Case(M=37, K=41, N=29, R=5)


@pytest.fixture(autouse=True)
def _torch_backend():
    with set_backend("torch"):
        yield


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.1], ids=["p0", "p0.1"])
def test_every_factor_in_every_dtype(dtype, nf4, p):
    for R in (1, 8, 64, 100, 256):
        check(replace(BASE, dtype=dtype, nf4=nf4, p=p, R=R))
        check(replace(BASE, dtype=dtype, nf4=nf4, p=p, R=R, factors=FACTORS))


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize(
    "case",
    variations(
        replace(BASE, dtype=BF16, adapter_dtype=FP32),
        M=(0, 1),
        R=(1024,),
        dtype=(FP16, FP32),
        x_layout=("transposed", "sliced", "zero-stride"),
        dY_layout=("transposed", "sliced", "zero-stride"),
        factors=(("x",), ("x", "bias"), ("x", "g"), ("x", "A", "B"), FACTORS),
    ),
    ids=str,
)
def test_shapes_and_layouts(case):
    check(case)


@pytest.mark.parametrize("lead", [(2, 3, 6), (4, 9), ()], ids=str)
def test_leading_dimensions(lead):
    check(replace(BASE, M=36, lead=lead, dtype=BF16, adapter_dtype=FP32))


def test_leading_dimensions_in_another_order():
    """x and dY whose rows do not lie at equal distances."""
    operands = make(replace(BASE, M=36, lead=(4, 9)))
    t = operands.tensors

    def run(x, dY):
        y = functional.adapted_linear(x, operands.weight, A=t["A"], B=t["B"])
        return (y.detach(), *torch.autograd.grad(y, (t["x"], t["A"], t["B"]), dY))

    x, dY = t["x"].transpose(0, 1), operands.dY.transpose(0, 1)
    for a, b in zip(run(x, dY), run(x.contiguous(), dY.contiguous()), strict=True):
        assert_same_bits(a, b, name="permuted")


@settings(max_examples=40)
@given(
    M=st.integers(0, 40), K=st.integers(16, 78), N=st.integers(16, 78), R=st.integers(1, 40),
    dtype=st.sampled_from([FP32, BF16, FP16]), nf4=st.booleans(),
    x_layout=st.sampled_from(["contiguous", "transposed", "sliced"]),
    dY_layout=st.sampled_from(["contiguous", "transposed", "sliced"]),
    gains=st.sets(st.sampled_from(["b", "d", "g", "bias"])),
)  # fmt: skip
def test_any_shape(M, K, N, R, dtype, nf4, x_layout, dY_layout, gains):
    # Maximum and RMS of fewer than 16 elements say little: with 8, eager's own RMS is at the
    # ceiling where terms cancel.
    factors = tuple(name for name in FACTORS if name in {"x", "A", "B", *gains})
    check(Case(M, K, N, R, dtype, nf4=nf4, factors=factors, x_layout=x_layout, dY_layout=dY_layout))


@pytest.mark.parametrize("count", range(len(FACTORS) + 1))
def test_every_subset_of_gradients(count):
    for trains in itertools.combinations(FACTORS, count):
        results = check(replace(BASE, M=9, factors=FACTORS, trains=trains))
        assert {name for name in FACTORS if results["d" + name] is not None} == set(trains)


def saved_tensors(case: Case) -> list[torch.Tensor]:
    """Storages that the graph saves beyond the operands' own, each once."""
    operands = make(case)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = functional.adapted_linear(
            operands.tensors["x"], operands.weight, operands.tensors.get("bias"),
            **{name: operands.tensors.get(name) for name in ("A", "B", "b", "d", "g")},
            dropout_p=case.p, dropout_seed=case.seed if case.p else None,
        )  # fmt: skip
    parameters = {t.untyped_storage().data_ptr() for n, t in operands.tensors.items() if n != "x"}
    parameters.add(operands.dense.untyped_storage().data_ptr())
    by_storage = {t.untyped_storage().data_ptr(): t for t in kept}
    named = {
        operands.tensors["x"].untyped_storage().data_ptr(): "x",
        y.untyped_storage().data_ptr(): "y",
    }
    return sorted(
        named.get(pointer, f"{tuple(t.shape)} {t.dtype}")
        for pointer, t in by_storage.items()
        if pointer not in parameters
    )


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.1], ids=["p0", "p0.1"])
@pytest.mark.parametrize(
    ("method", "factors", "trains", "expected"),
    [
        ("LoRA", ("x", "A", "B"), ("x", "A", "B"), ["S", "x"]),
        ("LoRA-FA", ("x", "A", "B"), ("x", "B"), ["S"]),
        ("frozen adapter", ("x", "A", "B"), ("x",), []),
        ("VeRA", ("x", "A", "B", "b", "d"), ("x", "b", "d"), ["S"]),
        ("DoRA", ("x", "A", "B", "g"), ("x", "A", "B", "g"), ["S", "V", "x"]),
        ("AdaLoRA", ("x", "A", "B", "d"), ("x", "A", "B", "d"), ["S", "x"]),
        ("IA3", ("x", "g"), ("x", "g"), ["V"]),
        ("BitFit", ("x", "bias"), ("x", "bias"), []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_saves_what_the_method_needs_and_nothing_else(method, factors, trains, expected, nf4, p):
    case = replace(
        BASE, dtype=BF16, adapter_dtype=FP32, nf4=nf4, factors=factors, trains=trains,
        p=p if "A" in factors else 0.0,
    )  # fmt: skip
    shapes = {"S": (case.M, case.R), "V": (case.M, case.N)}
    named = [f"{shapes[n]} torch.bfloat16" if n in shapes else n for n in expected]
    if case.p:
        # A copy of x, which the caller may change in place; the mask is drawn again.
        named = [f"{(case.M, case.K)} torch.bfloat16" if n == "x" else n for n in named]
    assert saved_tensors(case) == sorted(named)


def test_inputs_are_not_modified():
    operands = make(replace(BASE, factors=FACTORS))
    before = {name: value.detach().clone() for name, value in operands.tensors.items()}
    dY = operands.dY.clone()
    fused(operands)
    for name, value in before.items():
        assert_same_bits(operands.tensors[name], value, name=name)
    assert_same_bits(operands.dY, dY, name="dY")


def test_second_backward_gives_the_same_bits_and_double_backward_is_refused():
    operands = make(replace(BASE, factors=FACTORS, p=0.2))
    t = operands.tensors
    leaves = list(t.values())
    y = functional.adapted_linear(
        t["x"], operands.weight, t["bias"], A=t["A"], B=t["B"], b=t["b"], d=t["d"], g=t["g"],
        dropout_p=0.2,
    )  # fmt: skip
    first = torch.autograd.grad(y, leaves, operands.dY, retain_graph=True)
    second = torch.autograd.grad(y, leaves, operands.dY, retain_graph=True)
    for name, a, b in zip(t, first, second, strict=True):
        assert_same_bits(a, b, name=name)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (dx,) = torch.autograd.grad(y, t["x"], operands.dY.requires_grad_(), create_graph=True)
        dx.sum().backward()


def test_gradient_of_a_trained_weight():
    t = make(BASE).tensors
    weight = torch.randn(BASE.N, BASE.K, requires_grad=True)
    y = functional.adapted_linear(t["x"], weight, t["bias"], A=t["A"], B=t["B"])
    dY = torch.randn_like(y)
    y.backward(dY)
    torch.testing.assert_close(weight.grad, dY.T @ t["x"])


def test_three_steps_move_what_trains_and_nothing_else():
    operands = make(replace(BASE, factors=FACTORS, trains=("A", "B", "d", "bias")))
    t = operands.tensors
    before = {name: value.detach().clone() for name, value in t.items()}
    optimizer = torch.optim.AdamW([value for value in t.values() if value.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        y = functional.adapted_linear(t["x"], operands.weight, t["bias"], A=t["A"], B=t["B"],
                                      b=t["b"], d=t["d"], g=t["g"])  # fmt: skip
        y.square().mean().backward()
        optimizer.step()
    moved = {name for name in t if not torch.equal(t[name].detach(), before[name])}
    assert moved == {"A", "B", "d", "bias"}


def test_four_micro_batches_equal_one_batch():
    operands = make(replace(BASE, M=32))
    t = operands.tensors

    def gradient(parts: int) -> torch.Tensor:
        t["A"].grad = None
        for x, dY in zip(t["x"].chunk(parts), operands.dY.chunk(parts), strict=True):
            functional.adapted_linear(x, operands.weight, A=t["A"], B=t["B"]).backward(dY)
        return t["A"].grad

    assert_agree(gradient(4), gradient(1), within=ORDER_DIFFERENCE)


def test_nan_stays_in_its_row():
    operands = make(BASE)
    t = operands.tensors
    with torch.no_grad():
        t["x"][3] = float("nan")
        y = functional.adapted_linear(t["x"], operands.weight, A=t["A"], B=t["B"])
    assert y[3].isnan().all()
    assert y.isnan().any(1).sum() == 1


def test_autocast_sets_the_compute_dtype():
    operands = make(replace(BASE, dtype=FP32))
    t = operands.tensors
    with torch.autocast("cpu", dtype=BF16):
        y = functional.adapted_linear(t["x"], operands.weight, t["bias"], A=t["A"], B=t["B"])
    assert y.dtype == BF16
    y.sum().backward()
    assert [t[name].grad.dtype for name in ("x", "A", "B", "bias")] == [FP32] * 4


def test_scaling_may_be_a_tensor():
    operands = make(BASE)
    t = operands.tensors
    results = []
    for scaling in (0.7, torch.tensor(0.7), torch.tensor([0.7])):
        y = functional.adapted_linear(
            t["x"], operands.weight, t["bias"], A=t["A"], B=t["B"], scaling=scaling
        )
        results.append((y, *torch.autograd.grad(y, (t["x"], t["A"], t["B"]), operands.dY)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("native_dtypes")
def test_gain_of_zero_and_small_gains_beside_a_large_bias():
    case = replace(BASE, dtype=BF16, adapter_dtype=FP32, factors=("x", "bias", "A", "B", "g"))
    operands = make(case)
    with torch.no_grad():
        operands.tensors["g"][:9] = 0.0
        operands.tensors["g"][9:19] = 1e-3
        operands.tensors["bias"].mul_(100)
    assert_all_accurate(
        fused(operands), exact(operands), eager(operands), compute_dtype=BF16, name="gains"
    )


def test_dropout_seed_is_drawn_from_torchs_generator():
    t = make(BASE).tensors
    weight = torch.randn(BASE.N, BASE.K)

    def run() -> torch.Tensor:
        return functional.adapted_linear(t["x"], weight, A=t["A"], B=t["B"], dropout_p=0.5)

    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert_same_bits(run(), first, name="same seed")
    assert not torch.equal(first, second)


def test_all_dropped_leaves_the_base_and_no_adapter_gradient():
    operands = make(replace(BASE, p=1.0))
    results = check(operands.case)
    assert not results["dA"].any() and not results["dB"].any()


@pytest.mark.parametrize("name", ["y", "dx", "dA", "dB", "db", "dd", "dg", "dbias"])
def test_the_rule_notices_one_percent(monkeypatch, name):
    """A test of the tests: any output or gradient that is 1.01 times too large is caught."""

    def forward(*args):
        (y,), saved = original_forward(*args)
        return [y * 1.01 if name == "y" else y], saved

    def backward(*args):
        (grads,) = original_backward(*args)
        field = name.removeprefix("d")
        return [grads if name == "y" else grads._replace(**{field: getattr(grads, field) * 1.01})]

    original_forward, original_backward = TorchBackend.forward, TorchBackend.backward
    monkeypatch.setattr(TorchBackend, "forward", forward)
    monkeypatch.setattr(TorchBackend, "backward", backward)
    for dtype in (FP32, BF16):
        with pytest.raises(AssertionError, match=f"[.]{name} "):
            check(replace(BASE, dtype=dtype, factors=FACTORS))


def test_the_rule_notices_a_dropped_bias_and_swapped_nibbles(monkeypatch):
    original = TorchBackend.forward

    def without_bias(self, x, fs, needs):
        return original(self, x, [f._replace(bias=None) for f in fs], needs)

    monkeypatch.setattr(TorchBackend, "forward", without_bias)
    with pytest.raises(AssertionError, match=r"\.y "):
        check(BASE)
    monkeypatch.setattr(TorchBackend, "forward", original)
    operands = make(replace(BASE, nf4=True))
    swapped = (operands.weight.packed >> 4) | (operands.weight.packed << 4)
    operands.weight = NF4Weight(swapped, operands.weight.quant_state)
    assert not torch.allclose(fused(operands)["y"], eager(operands)["y"][0], atol=0.1)


@pytest.mark.gpu
@pytest.mark.pretended
def test_dropout_seed_on_a_gpu_follows_its_generator():
    """The same state gives the same seed, every draw another one; nothing waits for the device."""
    device = torch.device("cuda")
    torch.manual_seed(5)
    first, second = draw_seed(device), draw_seed(device)
    torch.manual_seed(5)
    assert draw_seed(device) == first != second


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_backward_agrees_with_finite_differences(p):
    """In float64, along random directions."""
    operands = make(replace(BASE, M=9, dtype=torch.float64, factors=FACTORS, p=p))
    names = list(operands.tensors)

    def call(weight, *values):
        t = dict(zip(names, values, strict=True))
        return functional.adapted_linear(
            t.pop("x"), weight, t.pop("bias"), **t, scaling=0.7, dropout_p=p, dropout_seed=3
        )

    inputs = (operands.dense.requires_grad_(), *operands.tensors.values())
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_stays_in_its_row_backward_as_well(value, dtype):
    case = replace(BASE, dtype=dtype, factors=FACTORS, p=0.3, nf4=True)
    check_rows_keep_apart(case, value)
