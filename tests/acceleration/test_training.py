"""An accelerated model trains as stock PEFT does: 32 steps side by side."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lora_models import K, Mlp, N, accelerated_copy, counted, float64_copy, peft_model
from torch import Tensor, nn

from bench.instruments.accuracy import assert_all_accurate

STEPS = 32

# AdamW starts with the sign of each gradient: there bfloat16 rounding becomes whole steps, in stock
# PEFT as well. Momentum lets bfloat16 runs be compared as closely as their gradients are.
RUNS: dict[torch.dtype, Callable[..., torch.optim.Optimizer]] = {
    torch.float32: partial(torch.optim.AdamW, lr=0.01),
    torch.bfloat16: partial(torch.optim.SGD, lr=0.3, momentum=0.9),
}


@pytest.mark.parametrize("dtype", RUNS)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_losses_logits_and_parameters(kind: str, dtype: torch.dtype) -> None:
    stock = peft_model(kind, dtype, compute_dtype=dtype, model=Mlp(), init_lora_weights=True)
    fused, wide = accelerated_copy(stock), float64_copy(stock)
    x, target = torch.randn(64, K, dtype=dtype), torch.randn(64, N).to(dtype)
    actual = _train(fused, x, target.float(), RUNS[dtype])
    ref64 = _train(wide, x.double(), target.double(), RUNS[dtype])
    eager = _train(stock, x, target.float(), RUNS[dtype])

    losses = actual["losses"]
    assert losses[-1] < 0.9 * losses[0], "the model must learn something"
    if dtype == torch.float32:
        assert ((losses - eager["losses"]).abs() <= 1e-4 * eager["losses"]).all()
    assert_all_accurate(actual, ref64, eager, compute_dtype=dtype)
    assert counted(fused) == (2 * STEPS + 2, {})


def _train(
    model: Any, x: Tensor, target: Tensor, make_optimizer: Callable[..., torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """The loss of every step, then the logits and every trained parameter."""
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x).to(target.dtype), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {"losses": torch.stack(losses), "logits": model(x).detach(), **parameters}
