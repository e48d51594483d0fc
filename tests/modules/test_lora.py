"""LoRALinear: the numbers of stock PEFT with the same weights, and a module's life cycle."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from lora_models import (
    K,
    N,
    assert_equal_runs,
    counted,
    float64_copy,
    lora_layers,
    nf4_linear,
    peft_model,
    run,
)
from torch import Tensor, nn

from bench.instruments.accuracy import (
    assert_accurate,
    assert_all_accurate,
    assert_same_bits,
    orders,
)
from lora_fast import LoRALinear, NF4Weight, reference
from lora_fast.backends.selection import backend_for

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KINDS = ["dense", "nf4"]


def _twin(stock: Any) -> LoRALinear:
    """A LoRALinear with the weights of the one layer of a stock PEFT model."""
    (layer,) = lora_layers(stock)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    ours = LoRALinear.from_linear(
        copy.deepcopy(layer.base_layer),
        r=A.shape[0],
        lora_alpha=layer.lora_alpha["default"],
        use_rslora=layer.use_rslora["default"],
        dtype=A.dtype,
    )
    with torch.no_grad():
        ours.lora_A.copy_(A)
        ours.lora_B.copy_(B)
    return ours


def _as_ours(results: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    names = {
        "base_model.model.fc.lora_A.default.weight": "lora_A",
        "base_model.model.fc.lora_B.default.weight": "lora_B",
    }
    return {names.get(name, name): tensor for name, tensor in results.items()}


def _adapted(kind: str = "dense", dtype: torch.dtype = F32, **arguments: Any) -> LoRALinear:
    linear = nn.Linear(K, N).to(dtype)
    layer = LoRALinear.from_linear(
        nf4_linear(linear, dtype) if kind == "nf4" else linear, **{"r": 5, **arguments}
    )
    nn.init.normal_(layer.lora_B)
    return layer


def _specified(layer: LoRALinear, x: Tensor, **dropout: Any) -> Tensor:
    """The specification in x's dtype, for the parameters of `layer`."""
    weight = layer.base_layer.weight
    if isinstance(layer.base_layer, bnb.nn.Linear4bit):
        weight = NF4Weight.from_params4bit(weight)
    factors = {"A": layer.lora_A, "B": layer.lora_B, "scaling": layer.scaling}
    return reference.adapted_linear(x, weight, layer.base_layer.bias, **factors, **dropout)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_peft(
    kind: str, rslora: bool, dtype: torch.dtype
) -> None:
    stock = peft_model(kind, dtype, compute_dtype=dtype, use_rslora=rslora)
    ours = _twin(stock)
    x = torch.randn(3, 7, K, dtype=dtype)
    actual = run(ours, x)
    assert actual["y"].dtype == run(stock, x)["y"].dtype
    assert_all_accurate(
        actual,
        _as_ours(run(float64_copy(stock), x.double())),
        _as_ours(orders(lambda: run(stock, x, dtype if dtype != F32 else None))),
        compute_dtype=dtype,
    )
    assert counted(ours) == (1, {})


def test_parameters_are_named_and_initialised_as_in_peft() -> None:
    layer = LoRALinear.from_linear(nn.Linear(K, N), r=3)
    shapes = {n: tuple(p.shape) for n, p in layer.named_parameters() if p.requires_grad}
    assert shapes == {"lora_A": (3, K), "lora_B": (N, 3)}
    assert not layer.lora_B.any()
    torch.manual_seed(4)
    layer.reset_parameters()
    torch.manual_seed(4)
    expected = nn.Linear(K, 3, bias=False).weight
    assert torch.equal(layer.lora_A, expected)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 8 / 4), (True, 8 / 2)])
def test_scaling_and_repr(rslora: bool, scaling: float) -> None:
    layer = LoRALinear.from_linear(
        nn.Linear(K, N), r=4, lora_alpha=8, lora_dropout=0.1, use_rslora=rslora
    )
    assert layer.scaling == scaling
    assert layer.extra_repr() == (
        f"in_features={K}, out_features={N}, r=4, lora_alpha=8, lora_dropout=0.1, "
        f"scaling={scaling:g}, merged=False"
    )
    assert "(base_layer): Linear(" in repr(layer)


def test_the_base_is_shared_and_frozen() -> None:
    linear = nn.Linear(K, N).eval()
    layer = LoRALinear.from_linear(linear)
    assert layer.base_layer is linear
    assert not layer.training
    assert not linear.weight.requires_grad and not linear.bias.requires_grad
    assert torch.equal(layer(torch.ones(2, K)), linear(torch.ones(2, K)))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_in_training_only(kind: str) -> None:
    layer = _adapted(kind, lora_dropout=0.5)
    x = torch.randn(6, K)
    torch.manual_seed(9)
    y = layer(x)
    torch.manual_seed(9)
    mask = backend_for(x.device).dropout_mask(int(torch.randint(2**62, ())), 6, K, 0.5, x.device)
    dropout = {"dropout_p": 0.5, "dropout_mask": mask}
    eager = orders(lambda: _specified(layer, x, **dropout))
    assert_accurate(y, _specified(layer, x.double(), **dropout), eager, name="y")
    without = copy.deepcopy(layer)
    without.lora_dropout = 0.0
    assert torch.equal(layer.eval()(x), without(x))
    assert counted(layer) == (2, {})


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge(kind: str, dtype: torch.dtype) -> None:
    layer = _adapted(kind, dtype, lora_alpha=1)
    x = torch.randn(9, K, dtype=dtype)
    before, y = copy.deepcopy(layer.state_dict()), layer(x).detach()
    exact, base = _specified(layer, x.double()), layer.base_layer(x)
    layer.merge()
    assert layer.merged and "merged=True" in repr(layer)
    merged = layer(x)
    if kind == "dense":
        assert_accurate(merged, exact, y, name="merged", compute_dtype=dtype)
    else:
        # Quantised once more: the adapter has arrived, though less exactly than the rule requires.
        assert (merged - exact).norm() < (base - exact).norm() / 2
    layer.unmerge()
    after = layer.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert_same_bits(after[name], tensor, name=name)
    assert torch.equal(layer(x), y)
    assert counted(layer) == (2, {"merged": 1})


def test_merging_twice_and_unmerging_first_are_errors() -> None:
    layer = _adapted()
    with pytest.raises(RuntimeError, match="merged layer, got an unmerged one"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="unmerged layer, got a merged one"):
        layer.merge()


def test_a_broken_adapter_is_not_merged() -> None:
    layer = _adapted()
    weight = layer.base_layer.weight
    with torch.no_grad():
        layer.lora_B[3, 1] = float("inf")
    with pytest.raises(ValueError, match="merged weight must be finite"):
        layer.merge()
    assert layer.base_layer.weight is weight and not layer.merged


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_state_dict(kind: str) -> None:
    layer = _adapted(kind)
    x = torch.randn(5, K)
    expected = run(layer, x)
    merged = copy.deepcopy(layer)
    merged.merge()
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_equal_runs(run(clone, x), expected)
    back = pickle.loads(pickle.dumps(merged))
    back.unmerge()
    assert_equal_runs(run(back, x), expected)
    if kind == "dense":
        other = _adapted()
        other.load_state_dict(layer.state_dict())
        assert_equal_runs(run(other, x), expected)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_to_dtype_while_merged(dtype: torch.dtype) -> None:
    layer = _adapted()
    weight = layer.base_layer.weight.detach().clone()
    layer.merge()
    layer.to(dtype)
    layer.unmerge()
    assert layer.lora_A.dtype == dtype
    assert_same_bits(layer.base_layer.weight.detach(), weight.to(dtype), name="weight")


def test_obstacles_run_the_plain_equation() -> None:
    layer, plain = _adapted(), _adapted()
    plain.load_state_dict(layer.state_dict())
    layer.base_layer.register_forward_hook(lambda module, args, y: y * 2)
    x = torch.randn(5, K)
    actual = run(layer, x)
    expected = layer.base_layer(x) + layer.scaling * (x @ layer.lora_A.T @ layer.lora_B.T)
    assert torch.equal(actual["y"], expected.detach())
    expected = run(copy.deepcopy(plain).double(), x.double())["lora_B"]
    eager = orders(lambda: run(plain, x))["lora_B"]
    assert_accurate(actual["lora_B"], expected, eager, name="lora_B")
    assert counted(layer) == (0, {"hooks on base layer": 1})
    assert counted(plain) == (3, {})


def test_float64_runs_the_plain_equation() -> None:
    layer = _adapted().double()
    x = torch.randn(5, K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert set(counted(layer)[1]) == {"dtype float64"} and counted(layer)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": -2}, ValueError, "r must be at least 1, got -2"),
        ({"r": 2.0}, TypeError, "r must be an int, got float"),
        ({"r": True}, TypeError, "r must be an int, got bool"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be finite, got nan"),
        ({"lora_alpha": float("inf")}, ValueError, "lora_alpha must be finite, got inf"),
        ({"lora_alpha": "8"}, TypeError, "lora_alpha must be a number, got str"),
        ({"lora_dropout": 1.5}, ValueError, "lora_dropout must lie in"),
        ({"lora_dropout": None}, TypeError, "lora_dropout must be a number, got NoneType"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating point dtype, got torch.int8"),
    ],
)
def test_wrong_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    linear = nn.Linear(K, N)
    with pytest.raises(error, match=message):
        LoRALinear.from_linear(linear, **arguments)
    assert linear.weight.requires_grad, "a failed call must not freeze the layer"


@pytest.mark.parametrize(
    ("linear", "error", "message"),
    [
        (lambda: nn.Conv1d(2, 2, 1), TypeError, "linear must be a torch.nn.Linear, got Conv1d"),
        (lambda: "fc", TypeError, "linear must be a torch.nn.Linear, got str"),
        (lambda: bnb.nn.Linear8bitLt(4, 4), ValueError, "base layer is Linear8bitLt"),
        (lambda: bnb.nn.Linear4bit(4, 4), ValueError, "base layer is not quantised yet"),
        (lambda: nn.Linear(4, 4, device="meta"), ValueError, "weight is on the meta device"),
    ],
)
def test_wrong_layers(linear: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LoRALinear.from_linear(linear())
