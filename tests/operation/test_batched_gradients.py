"""Gradients of a batch of dYs are those of each dY, on every operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import expert_models
import gated_models
import pytest
import torch
from attentions import Attention
from lora_models import K, accelerated_copy, assert_same_bits, lora_layers, peft_model
from torch import Tensor, nn

import lora_fast

BATCH = 3
Model = tuple[nn.Module, Tensor]


def _layer(kind: str = "dense", **options: Any) -> Model:
    return accelerated_copy(peft_model(kind, **options).train()), torch.randn(2, 5, K)


def _mlp(kind: str = "dense") -> Model:
    return accelerated_copy(gated_models.stock_model(kind)), torch.randn(5, gated_models.H)


def _experts() -> Model:
    _, block = expert_models.fused_blocks("qwen3_moe")
    return block, torch.randn(1, 6, 32)


MODELS: dict[str, Callable[[], Model]] = {
    "layer": _layer,
    "NF4": lambda: _layer("nf4"),
    "dropout": lambda: _layer(lora_dropout=1.0),
    "DoRA": lambda: _layer(use_dora=True),
    "MLP": _mlp,
    "experts": _experts,
}


def _case(name: str) -> tuple[Tensor, list[Tensor], Tensor]:
    model, x = MODELS[name]()
    x = x.requires_grad_()
    y = model(x)
    y = y[0] if isinstance(y, tuple) else y
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    return y, [x, *trained], torch.randn(BATCH, *y.shape)


def _one_after_the_other(y: Tensor, of: list[Tensor], dYs: Tensor) -> list[Tensor]:
    each = [torch.autograd.grad(y, of, dY, retain_graph=True) for dY in dYs]
    return [torch.stack(column) for column in zip(*each, strict=True)]


def _check(found: Any, expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits(one, other, name=str(i))


@pytest.mark.parametrize("name", MODELS)
def test_batched(name: str) -> None:
    y, of, dYs = _case(name)
    expected = _one_after_the_other(y, of, dYs)
    found = torch.autograd.grad(y, of, dYs, retain_graph=True, is_grads_batched=True)
    _check(found, expected)
    _check(torch.autograd.grad(y, of, dYs, is_grads_batched=True), expected)


@pytest.mark.parametrize("name", MODELS)
def test_vmap(name: str) -> None:
    y, of, dYs = _case(name)

    def gradients(dY: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, of, dY, retain_graph=True)

    expected = _one_after_the_other(y, of, dYs)
    _check(torch.vmap(gradients)(dYs), expected)
    twice = torch.vmap(torch.vmap(gradients))(torch.stack([dYs, 2 * dYs]))
    _check([t[0] for t in twice], expected)


def test_a_group() -> None:
    model = accelerated_copy(peft_model(model=Attention(), target_modules=r".*_proj"))
    x = torch.randn(4, K, requires_grad=True)
    y = model(x)
    # k and v, then q alone: a member whose output is unused has no dY.
    for used in (y, y[..., :20]):
        dYs = torch.randn(BATCH, *used.shape)
        expected = _one_after_the_other(used, [x], dYs)
        found = torch.autograd.grad(used, [x], dYs, retain_graph=True, is_grads_batched=True)
        _check(found, expected)
    assert all(layer._lora_fast_calls.fused == 1 for layer in lora_layers(model))


def test_vectorised_jacobian() -> None:
    model, x = _mlp()
    jacobian = torch.autograd.functional.jacobian
    assert_same_bits(jacobian(model, x, vectorize=True), jacobian(model, x), name="jacobian")


def test_what_no_batch_is_computed_for_is_refused() -> None:
    y, of, dYs = _case("layer")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y, of, dYs, is_grads_batched=True, create_graph=True)
    batches = torch.stack([dYs, dYs])

    def of_batch(batch: Tensor) -> Any:
        return torch.autograd.grad(y, of, batch, retain_graph=True, is_grads_batched=True)

    with pytest.raises(RuntimeError, match="no batches of batches"):
        torch._vmap_internals._vmap(of_batch)(batches)


@pytest.mark.interpreter
def test_kernels_see_one_member_at_a_time() -> None:
    with lora_fast.set_backend("triton"):
        y, of, dYs = _case("layer")
        expected = _one_after_the_other(y, of, dYs)
        _check(torch.autograd.grad(y, of, dYs, is_grads_batched=True), expected)
