"""DoRALinear and VeRALinear: values, gradients, states, against the reference and PEFT."""

from __future__ import annotations

import copy
import io
from typing import Any

import peft
import pytest
import torch
from lora_models import K, Mlp, N, counted, nf4_linear, run
from torch import Tensor, nn

import lora_fast
from bench.instruments.accuracy import ORDER_DIFFERENCE, assert_agree, assert_all_accurate, orders
from lora_fast import DoRALinear, VeRALinear
from lora_fast.backends.selection import backend_for
from lora_fast.modules.vera import VeRAProjections

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
METHODS = {"dora": (DoRALinear, {"r": 5, "lora_alpha": 8}), "vera": (VeRALinear, {"r": 37})}


def layer_of(method: str, kind: str = "dense", dtype: torch.dtype = F32, **more: Any) -> Any:
    """A layer whose every trained number is off its start."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N).to(dtype)
    base = nf4_linear(linear, dtype) if kind == "nf4" else linear
    kind_of_layer, arguments = METHODS[method]
    layer = kind_of_layer.from_linear(base, **{**arguments, **more})
    with torch.no_grad():
        for parameter in (p for p in layer.parameters() if p.requires_grad):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


class Plain(nn.Module):
    """The same layer by PyTorch's own operations."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer._plain(x)


class Called(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _wide(layer: Any) -> nn.Module:
    wide = copy.deepcopy(layer)
    base = wide.base_layer
    if hasattr(base.weight, "quant_state"):
        weight = lora_fast.NF4Weight.from_params4bit(base.weight).dequantize(F32)
        wide.base_layer = nn.Linear(K, N)
        wide.base_layer.weight = nn.Parameter(weight, requires_grad=False)
        wide.base_layer.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
    return Plain(wide.double())


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients(method: str, kind: str, dtype: torch.dtype) -> None:
    layer = layer_of(method, kind, dtype)
    x = torch.randn(3, 7, K, dtype=dtype)
    autocast = dtype if dtype != F32 else None
    plain = Plain(copy.deepcopy(layer))
    eager = orders(lambda: run(plain, x, autocast))
    assert_all_accurate(
        run(Called(layer), x), run(_wide(layer), x.double()), eager, compute_dtype=dtype
    )
    assert counted(layer) == (1, {})


@pytest.mark.parametrize("method", METHODS)
def test_dropout_acts_on_what_enters_A(method: str) -> None:
    """Differential: the mean over masks is the layer without dropout, the base is not touched."""
    name = "lora_dropout" if method == "dora" else "vera_dropout"
    layer = layer_of(method, **{name: 0.5})
    x = torch.randn(6, K)
    torch.manual_seed(4)
    y = layer(x)
    torch.manual_seed(4)
    mask = backend_for(x.device).dropout_mask(int(torch.randint(2**62, ())), 6, K, 0.5, x.device)
    term, g = layer.low_rank(), layer.gain()
    S = torch.where(mask, x, 0.0) * 2.0 @ term.A.T
    delta = (S if term.d is None else S * term.d) @ term.B.T * term.scaling
    V = x @ layer.base_layer.weight.T + (delta if term.b is None else delta * term.b)
    expected = (V if g is None else V * g) + layer.base_layer.bias
    torch.testing.assert_close(y, expected)
    assert torch.equal(layer.eval()(x), layer(x))


def test_dora_starts_as_its_base_layer_and_m_as_its_norms() -> None:
    linear = nn.Linear(K, N)
    layer = DoRALinear.from_linear(copy.deepcopy(linear), r=4)
    x = torch.randn(5, K)
    torch.testing.assert_close(layer(x), linear(x))
    norms = torch.linalg.vector_norm(linear.weight, dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector.data, norms.data)


def test_vera_starts_as_its_base_layer() -> None:
    linear = nn.Linear(K, N)
    layer = VeRALinear.from_linear(linear, r=32)
    x = torch.randn(5, K)
    assert torch.equal(layer(x), linear(x))
    assert torch.equal(layer.vera_lambda_d, torch.full((32,), 0.1))
    assert not any(p.requires_grad for p in layer.base_layer.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_merge_and_unmerge(method: str) -> None:
    for kind in ("dense", "nf4"):
        layer = layer_of(method, kind).eval()
        x = torch.randn(5, K)
        before = layer(x)
        weight = layer.base_layer.weight.detach().clone()
        layer.merge(dequantize=kind == "nf4")
        assert_agree(layer(x), before, within=ORDER_DIFFERENCE)
        assert counted(layer) == (1, {"merged": 1})
        layer.unmerge()
        assert torch.equal(layer.base_layer.weight, weight)
        torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize("method", METHODS)
def test_copies_pickles_and_states(method: str) -> None:
    layer = layer_of(method)
    x = torch.randn(5, K)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), y)
    other = layer_of(method)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)


def test_vera_projections_are_peft_s_and_shared_by_a_converted_model() -> None:
    torch.manual_seed(0)
    model = Mlp()
    theirs = peft.get_peft_model(
        copy.deepcopy(model),
        peft.VeraConfig(r=16, target_modules=["fc1", "fc2"], projection_prng_key=7),
    )
    ours = lora_fast.convert(model, "all-linear", method="vera", r=16, projection_prng_key=7)
    assert ours.fc1.projections is ours.fc2.projections
    assert torch.equal(ours.fc1.projections.vera_A, theirs.base_model.vera_A["default"])
    assert torch.equal(ours.fc1.projections.vera_B, theirs.base_model.vera_B["default"])
    assert not any("vera_A" in name for name in ours.state_dict())
    for layers in (ours, theirs.base_model.model):
        for layer in (layers.fc1, layers.fc2):
            lambdas = [p for n, p in layer.named_parameters() if "lambda" in n]
            for value in lambdas:
                torch.manual_seed(len(value))
                value.data.normal_()
    x = torch.randn(9, K)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.double()
    assert ours.fc1.projections is ours.fc2.projections
    assert ours.fc1.projections.vera_A.dtype == torch.float64


def test_dora_equals_peft_without_dropout() -> None:
    torch.manual_seed(0)
    model = Mlp()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["fc1", "fc2"], use_dora=True)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    ours = lora_fast.convert(model, "all-linear", method="dora", r=4, lora_alpha=8)
    for name in ("fc1", "fc2"):
        mine, peer = getattr(ours, name), getattr(theirs.base_model.model, name)
        with torch.no_grad():
            mine.lora_B.normal_()
            peer.lora_A["default"].weight.copy_(mine.lora_A)
            peer.lora_B["default"].weight.copy_(mine.lora_B)
    x = torch.randn(9, K)
    torch.testing.assert_close(ours(x), theirs(x))
    assert counted(ours) == (2, {})


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"r": 0}, ValueError, "r must be at least 1"),
        ({"r": True}, TypeError, "r must be an int"),
        ({"vera_dropout": 2.0}, ValueError, "vera_dropout must lie in"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating point dtype"),
        ({"projections": 3}, TypeError, "projections must be VeRAProjections, got int"),
        (
            {"r": 8, "projections": VeRAProjections(K, N - 1, 8)},
            ValueError,
            r"projections must have A \[8, ≥ 24\] and B \[≥ 20, 8\]",
        ),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    linear = nn.Linear(K, N)
    with pytest.raises(kind, match=message):
        VeRALinear.from_linear(linear, **arguments)
    assert linear.weight.requires_grad, "nothing is half converted"
