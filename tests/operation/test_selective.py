"""Selective activation checkpointing: whatever a policy saves, the numbers are stock PEFT's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import attentions
import expert_models
import gated_models
import pytest
import torch
from lora_models import K, accelerated_copy, peft_model
from opaque_bases import opaque_model
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lora_fast.operation.selective import is_observed, unobserved


def _experts() -> tuple[nn.Module, nn.Module, int]:
    return *expert_models.fused_blocks("qwen3_moe"), 32


def _copied(stock: nn.Module, width: int) -> tuple[nn.Module, nn.Module, int]:
    return stock, accelerated_copy(stock), width


MODELS: dict[str, Callable[[], tuple[nn.Module, nn.Module, int]]] = {
    "layer": lambda: _copied(peft_model(), K),
    "NF4": lambda: _copied(peft_model("nf4"), K),
    "DoRA": lambda: _copied(peft_model(use_dora=True), K),
    "group": lambda: _copied(attentions.stock_model(), K),
    "MLP": lambda: _copied(gated_models.stock_model(), gated_models.H),
    "opaque": lambda: _copied(opaque_model("hooks"), K),
    "experts": _experts,
}


def _saves(words: tuple[str, ...], ctx: Any, op: Any, *args: Any, **options: Any) -> Any:
    saves = any(word in str(op) for word in words)
    return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE


POLICIES = {"products": ("mm",), "sums": ("aten.mul", "aten.add"), "nothing": ()}


def _gradients(model: nn.Module, x: Tensor, policy: str) -> list[Tensor | None]:
    saves = functools.partial(_saves, POLICIES[policy])
    leaf = x.clone().requires_grad_()
    y = checkpoint(
        model, leaf, use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, saves),
    )  # fmt: skip
    y = y[0] if isinstance(y, tuple) else y
    trained = [leaf, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(y.square().sum(), trained, allow_unused=True)
    return [y.detach(), *grads]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_whatever_a_policy_saves(name: str, policy: str) -> None:
    stock, fused, width = MODELS[name]()
    x = torch.randn(2, 5, width)
    # Stock PEFT itself raises where a policy saves what bitsandbytes writes to.
    torch.testing.assert_close(_gradients(fused, x, policy), _gradients(stock, x, "nothing"))
    layers = [m for m in fused.modules() if "_lora_fast_calls" in m.__dict__]
    assert layers and all(layer._lora_fast_calls.fused for layer in layers)


def test_policies_are_asked_again_afterwards() -> None:
    asked = []

    def policy(ctx: Any, op: Any, *args: Any, **options: Any) -> Any:
        asked.append(str(op))
        return CheckpointPolicy.PREFER_RECOMPUTE

    forward, _ = create_selective_checkpoint_contexts(policy)
    x = torch.ones(2)
    with forward:
        assert is_observed()
        with pytest.raises(ValueError), unobserved():
            assert not is_observed()
            torch.sin(x)
            raise ValueError
        assert is_observed()
        torch.cos(x)
    assert not is_observed() and asked == ["aten.cos.default"]
