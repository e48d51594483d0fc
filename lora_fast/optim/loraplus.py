"""Parameter groups of LoRA+: one learning rate for A, a larger one for B."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

# Parts of dotted names, as PEFT and lora_fast.modules have them.
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_SIDE_A = ("lora_A", "vera_lambda_d")
_SIDE_B = ("lora_B", "vera_lambda_b")


def loraplus_param_groups(
    model: nn.Module,
    lr: float,
    ratio: float = 16.0,
    weight_decay: float = 0.0,
    *,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """Groups of `model`'s trainable parameters for any optimizer, torch's or bitsandbytes'.

        lr(A) = lr        lr(B) = ratio · lr

    =============  ============  =================================================================
    group's name   rate          parameters
    =============  ============  =================================================================
    A              lr            lora_A and every other matrix that trains (a new head)
    A, no decay    lr            vera_lambda_d
    embedding      embedding_lr  lora_embedding_A, lora_embedding_B
    B              ratio · lr    lora_B
    B, no decay    ratio · lr    vera_lambda_b and all other vectors: biases, norms, magnitudes
    =============  ============  =================================================================

    As in the authors' implementation, vectors train at B's rate without weight decay and adapters
    of embeddings at a rate of their own. That implementation knows no VeRA; its vectors go to the
    side they scale. Every trainable parameter is in exactly one group, a shared one once; groups
    without a parameter are left out.

    Raises TypeError if `model` is not a Module; ValueError if lr, embedding_lr or weight_decay are
    negative, ratio is not positive, or no B factor of the model trains.
    Source: LoRA+ (Hayou, Ghosh & Yu 2024, §5; ratio 2⁴ is their recommendation).
    """
    _check(model, lr=lr, weight_decay=weight_decay, embedding_lr=embedding_lr)
    if not (_is_number(ratio) and ratio > 0):
        raise ValueError(f"ratio must be a positive number, got {ratio!r}")
    groups = {
        "A": (lr, weight_decay),
        "A, no decay": (lr, 0.0),
        "embedding": (embedding_lr, weight_decay),
        "B": (lr * ratio, weight_decay),
        "B, no decay": (lr * ratio, 0.0),
    }
    members: dict[str, list[nn.Parameter]] = {group: [] for group in groups}
    has_side_B = False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            members[_group(parts, parameter)].append(parameter)
            has_side_B |= any(part in (*_SIDE_B, "lora_embedding_B") for part in parts)
    if not has_side_B:
        raise ValueError("model must have a lora_B that trains, got none: LoRA+ is about its rate")
    return [
        {"name": group, "params": members[group], "lr": rate, "weight_decay": decay}
        for group, (rate, decay) in groups.items()
        if members[group]
    ]


def _group(parts: list[str], parameter: nn.Parameter) -> str:
    if any(part in _EMBEDDING for part in parts):
        return "embedding"
    if parameter.dim() <= 1:
        return "A, no decay" if any(part in _SIDE_A for part in parts) else "B, no decay"
    return "B" if any(part in _SIDE_B for part in parts) else "A"


def _check(model: Any, **rates: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value in rates.items():
        if not (_is_number(value) and value >= 0):
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
