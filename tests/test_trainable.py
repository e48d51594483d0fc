"""BitFit and LayerNorm tuning: what trains, and what the backward pass does not compute."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from lora_models import K, counted, nf4_linear, peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fast
from bench.instruments.accuracy import assert_models_agree
from lora_fast.trainable import mark_bitfit, mark_layer_norm

HIDDEN, N = 40, 20


class Block(nn.Module):
    """Two norms, two linear layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(K)
        self.fc1 = nn.Linear(K, HIDDEN)
        self.last_norm = nn.RMSNorm(HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.last_norm(torch.tanh(self.fc1(self.norm(x))))))


class _Products(TorchDispatchMode):
    """Shapes of the matrices that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[tuple[int, ...], ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            matrices = args[-2:]
            self.shapes[tuple(tuple(m.shape) for m in matrices)] += 1
        return func(*args, **(kwargs or {}))


def _backward(model: nn.Module, M: int = 7) -> Counter[tuple[tuple[int, ...], ...]]:
    """What the backward pass for x [M, K] multiplies."""
    loss = model(torch.randn(M, K)).square().sum()
    with _Products() as products:
        loss.backward()
    return products.shapes


def test_bitfit_trains_the_biases_alone() -> None:
    model = Block()
    names = mark_bitfit(model)
    assert names == ["norm.bias", "fc1.bias", "head.bias"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == names


def test_layer_norm_trains_the_norms_alone() -> None:
    model = Block()
    assert mark_layer_norm(model) == ["norm.weight", "norm.bias", "last_norm.weight"]


def test_norms_of_other_libraries() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    model = nn.Sequential(nn.Linear(K, K), LlamaRMSNorm(K), nn.BatchNorm1d(K))
    assert mark_layer_norm(model) == ["1.weight"]


@pytest.mark.parametrize("mark", [mark_bitfit, mark_layer_norm])
def test_the_backward_pass_computes_no_gradient_of_a_weight(mark: Any) -> None:
    model, M = Block(), 7
    everything = _backward(copy.deepcopy(model), M)
    mark(model)
    products = _backward(model, M)
    # dX of fc1, fc2 and head, and nothing whose result has the shape of a weight.
    assert products == {
        ((M, N), (N, HIDDEN)): 1,
        ((M, HIDDEN), (HIDDEN, HIDDEN)): 1,
        ((M, HIDDEN), (HIDDEN, K)): 1,
    }
    assert sum(everything.values()) == 6
    for module in (model.fc1, model.fc2, model.head):
        assert module.weight.grad is None


def test_the_first_layer_computes_no_gradient_of_its_input() -> None:
    model = nn.Linear(K, N)
    mark_bitfit(model)
    assert not _backward(model)
    assert model.bias.grad is not None


def test_the_head_goes_on_training() -> None:
    model = Block()
    assert mark_layer_norm(model, keep=["head"])[-2:] == ["head.weight", "head.bias"]
    model.head.weight.requires_grad_(False)
    assert mark_layer_norm(model, keep=["head"])[-1:] == ["head.bias"]


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("mark", [mark_bitfit, mark_layer_norm])
def test_with_accelerated_adapters(mark: Any, kind: str) -> None:
    """LoRA and biases (or norms) train together, fused, as they do in stock PEFT."""
    base: Any = Block()
    if kind == "nf4":
        base.fc1, base.fc2 = nf4_linear(base.fc1), nf4_linear(base.fc2)
    stock = peft_model(model=base, target_modules=["fc1", "fc2"])
    models = [copy.deepcopy(stock), stock]
    lora_fast.accelerate(models[0])
    x = torch.randn(5, K)
    gradients = []
    for model in models:
        names = mark(model, keep=["lora_A", "lora_B"])
        assert sum("lora_" in name for name in names) == 4 < len(names)
        model(x).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert counted(models[0]) == (2, {})
    assert_models_agree(*gradients)


def test_adapters_that_are_not_kept_are_frozen() -> None:
    model = lora_fast.accelerate(peft_model(model=Block(), target_modules=["fc1"]))
    names = mark_bitfit(model)
    assert all(name.endswith("bias") for name in names)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(5, K)).square().sum().backward()
    optimizer.step()
    moved = {
        name for (name, p), old in zip(model.named_parameters(), before, strict=True)
        if not torch.equal(p, old)
    }  # fmt: skip
    assert moved == set(names)


def test_quantised_models() -> None:
    model = nn.Sequential(nf4_linear(nn.Linear(K, N)), nn.LayerNorm(N))
    assert isinstance(model[0], bnb.nn.Linear4bit)
    assert mark_bitfit(model) == ["0.bias", "1.bias"]
    model(torch.randn(3, K)).square().sum().backward()
    assert model[0].bias.grad is not None


def test_shared_parameters_are_marked_once() -> None:
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    model[1].bias = model[0].bias
    assert mark_bitfit(model) == ["0.bias"]


@pytest.mark.parametrize("mark", [mark_bitfit, mark_layer_norm])
def test_refusals_change_nothing(mark: Any) -> None:
    model = nn.Sequential(nn.Linear(K, N, bias=False), nn.GELU())
    with pytest.raises(ValueError, match=r"model must have .*, got a Sequential without"):
        mark(model)
    assert model[0].weight.requires_grad
    block = Block()
    with pytest.raises(ValueError, match="keep must name parts of the model, got 'score'"):
        mark(block, keep=["head", "score"])
    assert all(p.requires_grad for p in block.parameters())
    with pytest.raises(TypeError, match="keep must be a list of names, got 'head'"):
        mark(block, keep="head")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        mark(3)
