"""x is changed in place after the layer: we train where stock PEFT trains, with the gradients of
the x that the layer has read, and raise where it raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gated_models import H, stock_model
from lora_models import (
    K,
    accelerated_copy,
    counted,
    lora_config,
    lora_layers,
    method_model,
    peft_model,
)
from peft import get_peft_model
from torch import Tensor, nn

import lora_fast
from bench.instruments.accuracy import ORDER_DIFFERENCE, assert_agree, assert_same_bits
from lora_fast import DoRALinear, LoRALinear, VeRALinear

N = 20
DROPS = ["lora", "dora", "vera", "adalora"]


def _write(x: Tensor) -> None:
    """As an activation, a residual connection, or an operation with an out-parameter would."""
    with torch.no_grad():
        torch.add(x, 1.0, out=x)


def _add(x: Tensor) -> None:
    x.add_(1.0)


def _fill_a_view(x: Tensor) -> None:
    x[..., :3].fill_(7.0)


CHANGES = [_write, _add, _fill_a_view]


def _gradients(model: Any, call: Any, change: Callable[[Tensor], None] | None) -> dict[str, Any]:
    """Those of every parameter and of the source of x; `change` comes after the layer."""
    torch.manual_seed(3)
    leaf = torch.randn(6, 3, K, requires_grad=True)
    model.zero_grad()
    torch.manual_seed(4)
    x = leaf * 1.0
    y = call(x)
    if change is not None:
        change(x)
    y.square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"leaf": leaf.grad, **found}


def check(fused: Any, call: Any, change: Callable[[Tensor], None]) -> None:
    expected = _gradients(fused, call, None)
    actual = _gradients(fused, call, change)
    for name, value in expected.items():
        assert_same_bits(actual[name], value, name=name)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("method", DROPS)
def test_with_dropout(method: str, kind: str, change: Callable[[Tensor], None]) -> None:
    stock = method_model(method, kind, dropout=0.3).train()
    fused = accelerated_copy(stock).train()
    _gradients(stock, stock, change)
    check(fused, fused, change)
    assert counted(fused)[1] == {}


@pytest.mark.parametrize("method", DROPS)
def test_without_dropout_as_stock(method: str) -> None:
    """VeRA's A is frozen, so x is not read again; the others save x itself."""
    stock = method_model(method, "dense").train()
    fused = accelerated_copy(stock).train()
    for model in (stock, fused):
        if method == "vera":
            _gradients(model, model, _add)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                _gradients(model, model, _add)


class Shared(nn.Module):
    """Layers that read the same x, under names that form a group."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(K, n) for n in (N, 8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


@pytest.mark.parametrize("change", CHANGES)
def test_a_group(change: Callable[[Tensor], None]) -> None:
    targets = ["q_proj", "k_proj", "v_proj"]
    config = lora_config(target_modules=targets, lora_dropout=0.3)
    stock = get_peft_model(Shared(), config).train()
    fused = accelerated_copy(stock).train()
    _gradients(stock, stock, change)
    check(fused, fused, change)
    assert counted(fused) == (6, {})


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("change", CHANGES)
def test_a_mixed_batch(change: Callable[[Tensor], None], p: float) -> None:
    """PEFT picks the rows of each adapter's samples, which copies them, with dropout or without."""
    stock = peft_model(lora_dropout=p)
    stock.add_adapter("other", lora_config(r=3, lora_dropout=p))
    stock.base_model.set_adapter(["default", "other"])
    names = ["default", "other", "__base__", "default", "other", "other"]
    fused = accelerated_copy(stock)
    for model in (stock.eval(), fused.eval()):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
    _gradients(stock, lambda x: stock(x, adapter_names=names), change)
    check(fused, lambda x: fused(x, adapter_names=names), change)
    assert counted(fused) == (2, {})


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear, VeRALinear])
def test_own_modules(kind: Any, change: Callable[[Tensor], None]) -> None:
    name = "vera_dropout" if kind is VeRALinear else "lora_dropout"
    layer = kind.from_linear(nn.Linear(K, N), r=4, **{name: 0.3})
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    check(layer, layer, change)


@pytest.mark.interpreter
def test_the_kernels_share_x_and_raise() -> None:
    fused = accelerated_copy(method_model("lora", "dense", dropout=0.3)).train()
    with (
        lora_fast.set_backend("triton"),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        check(fused, fused, _add)


@pytest.mark.interpreter
def test_the_kernels_save_no_x_for_frozen_factors() -> None:
    fused = accelerated_copy(method_model("vera", "dense", dropout=0.3)).train()
    with lora_fast.set_backend("triton"):
        check(fused, fused, _add)
    assert counted(fused) == (2, {})


def test_a_trained_weight_is_saved_as_torch_saves_it() -> None:
    """dW reads all of x, in stock as well."""
    weight, x = torch.randn(N, K, requires_grad=True), torch.randn(5, K, requires_grad=True) * 1.0
    A, B = torch.randn(4, K, requires_grad=True), torch.randn(N, 4)
    y = lora_fast.functional.adapted_linear(x, weight, A=A, B=B, dropout_p=0.3)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_residual_connection_in_place_under_compile() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = LoRALinear.from_linear(nn.Linear(K, K), r=4, lora_dropout=0.3)
            nn.init.normal_(self.fc.lora_B)

        def forward(self, x: Tensor) -> Tensor:
            h = x * 1.0
            y = self.fc(h)
            return h.add_(y)

    model = Residual()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for call in (model, compiled):
        torch.manual_seed(5)
        x = torch.randn(4, K)
        model.zero_grad()
        call(x).square().sum().backward()
        found.append(model.fc.lora_A.grad)
    assert_same_bits(*found, name="lora_A")


def _grouped() -> Any:
    config = lora_config(target_modules=["q_proj", "k_proj", "v_proj"])
    return get_peft_model(Shared(), config)


@pytest.mark.parametrize("build", [peft_model, _grouped, stock_model])
def test_a_frozen_bias_changes_or_comes_from_inference_mode(build: Callable[[], Any]) -> None:
    """No gradient reads it, and autograd saves no inference tensor."""
    stock = build()
    fused = accelerated_copy(stock)
    x = torch.randn(4, H if build is stock_model else K)
    for inference in (False, True):
        found = []
        for model in (fused, stock):
            bases = [layer.get_base_layer() for layer in lora_layers(model)]
            bases = [base for base in bases if base.bias is not None]
            if inference:
                with torch.inference_mode():
                    for base in bases:
                        base.bias = nn.Parameter(base.bias.clone(), requires_grad=False)
            biases = [base.bias for base in bases]
            assert all(bias.is_inference() == inference for bias in biases)
            y = model(x)
            if not inference:
                with torch.no_grad():
                    torch._foreach_mul_(biases, 3.0)
            trained = [p for p in model.parameters() if p.requires_grad]
            found.append([y, *torch.autograd.grad(y.sum(), trained)])
        for ours, theirs in zip(*found, strict=True):
            assert_agree(ours, theirs, within=ORDER_DIFFERENCE)
    assert counted(fused)[1] == {}
