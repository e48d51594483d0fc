"""Effective and stable rank of B A, layer by layer: how many directions an update really uses.

The singular values of B[N,R] A[R,K] are those of the R × R product of the triangular factors of B
and Aᵀ (two thin QR decompositions): the N × K product is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lora_fast.modules.adapter_module import AdapterModule

RECORDS = 10

Ranks = dict[str, dict[str, float]]


class EffectiveRanks(TrainerCallback, ExportableState):
    """Records the ranks of every layer at ten steps, evenly spread, the last one included.

    ``history`` is ``[[step, {layer: {"effective": …, "stable": …}}], …]``; checkpoints hold it.
    """

    def __init__(self) -> None:
        self.history: list[tuple[int, Ranks]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        every = max(1, state.max_steps // RECORDS)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self.record(state.global_step, model)

    def record(self, step: int, model: nn.Module) -> None:
        """Add the ranks that the model has now, if it has low-rank products."""
        found = layer_ranks(model)
        if found:
            self.history = [entry for entry in self.history if entry[0] != step]
            self.history.append((step, found))

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return {"args": {}, "attributes": {"history": self.history}}


def layer_ranks(model: nn.Module) -> Ranks:
    """Effective and stable rank of B A in every layer with a low-rank product."""
    found: Ranks = {}
    for name, left, right in low_rank_products(model):
        values = product_singular_values(left, right)
        found[name] = {"effective": effective_rank(values), "stable": stable_rank(values)}
    return found


@torch.no_grad()
def product_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """The singular values of ``left @ right`` ([N,R] and [R,K]), descending, float32.

    At most min(N, R, K) of them: the rest are zero. NaN where the product is not finite.
    """
    first = torch.linalg.qr(left.float(), mode="r").R
    second = torch.linalg.qr(right.float().mT, mode="r").R
    product = first @ second.mT
    if not product.isfinite().all():
        return product.new_full((min(product.shape),), torch.nan)
    values: Tensor = torch.linalg.svdvals(product)
    return values


def effective_rank(singular_values: Tensor) -> float:
    """exp(−Σ pᵢ ln pᵢ) with p = σ / Σσ (Roy and Vetterli 2007, eq. 4); 0 for zero."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    p = singular_values.double() / total.double()
    return float(torch.special.entr(p).sum().exp())


def stable_rank(singular_values: Tensor) -> float:
    """‖·‖²_F / ‖·‖²₂ = Σσ² / σ₁² (Rudelson and Vershynin 2007); 0 for zero."""
    largest = singular_values.max()
    if largest == 0:
        return 0.0
    return float((singular_values.double() / largest.double()).square().sum())


def low_rank_products(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (layer, B with its row and column factors [N,R], A [R,K]) of PEFT's active adapters.

    LoRA and its variants give B and A, AdaLoRA B·diag(Λ) and A, VeRA and layers of lora_fast's own
    diag(b)·B·diag(d) and A.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in model.named_modules():
        if isinstance(layer, AdapterModule):
            term = layer.low_rank()
            B = term.B if term.d is None else term.B * term.d
            yield name, B if term.b is None else term.b.unsqueeze(1) * B, term.A
        if not isinstance(layer, BaseTunerLayer):
            continue
        for adapter in layer.active_adapters:
            if adapter in getattr(layer, "vera_lambda_d", ()):
                b, d = layer.vera_lambda_b[adapter], layer.vera_lambda_d[adapter]
                A = layer.vera_A[adapter][:, : layer.in_features]
                B = layer.vera_B[adapter][: layer.out_features]
                yield _short(name), b.unsqueeze(1) * B * d, A
            elif adapter in getattr(layer, "lora_E", ()):
                B, lambdas = layer.lora_B[adapter], layer.lora_E[adapter]
                yield _short(name), B * lambdas.mT, layer.lora_A[adapter]
            elif adapter in getattr(layer, "lora_A", ()):
                yield _short(name), layer.lora_B[adapter].weight, layer.lora_A[adapter].weight


def summarise(history: list[tuple[int, Ranks]]) -> dict[str, Any] | None:
    """The entry of ``metrics.json``: means over layers by step, and each layer at the end.

    None if nothing was recorded.
    """
    if not history:
        return None
    last = history[-1][1]
    return {
        "steps": [step for step, _ in history],
        "mean_effective_rank": [_mean(ranks, "effective") for _, ranks in history],
        "mean_stable_rank": [_mean(ranks, "stable") for _, ranks in history],
        "layers": last,
    }


def _mean(ranks: Ranks, kind: str) -> float:
    # Rounded once, so that the order of the layers, which a checkpoint forgets, does not matter.
    return math.fsum(found[kind] for found in ranks.values()) / len(ranks)


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.")
