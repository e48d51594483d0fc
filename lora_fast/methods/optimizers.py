"""The optimizer of each method, from the class that ``--optim`` names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .options import MethodOptions

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from transformers import TrainingArguments


HEAD_NAMES = frozenset({"classifier", "score", "modules_to_save"})
DELTA_START = 0.1


def plain(
    model: nn.Module,
    args: TrainingArguments,
    config: MethodOptions,
    steps: int,
    head_rate: float | None,
) -> Optimizer:
    """``--optim`` over what trains; the head learns at most at ``head_rate``."""
    rate = config.lr or 0.0
    head: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if HEAD_NAMES & set(name.split(".")) else rest).append(parameter)
    slow = rate if head_rate is None else min(rate, head_rate)
    groups = [{"params": rest, "lr": rate}, {"params": head, "lr": slow}]
    return _named(args, model, [group for group in groups if group["params"]])


def lora_plus(
    model: nn.Module,
    args: TrainingArguments,
    config: MethodOptions,
    steps: int,
    head_rate: float | None,
) -> Optimizer:
    """``--optim`` with B learning faster than A (Hayou et al. 2024, LoRA+)."""
    from ..optim import loraplus_param_groups

    return _named(
        args, model, loraplus_param_groups(model, config.lr or 0.0, ratio=config.lr_ratio or 1.0)
    )


def lora_fa(
    model: Any,
    args: TrainingArguments,
    config: MethodOptions,
    steps: int,
    head_rate: float | None,
) -> Optimizer:
    """PEFT's LoRA-FA optimizer (Zhang et al. 2023)."""
    from peft.optimizers import create_lorafa_optimizer

    optimizer: Optimizer = create_lorafa_optimizer(
        model, r=config.r, lora_alpha=config.alpha, lr=config.lr
    )
    return optimizer


def delta_lora(
    model: nn.Module,
    args: TrainingArguments,
    config: MethodOptions,
    steps: int,
    head_rate: float | None,
) -> Optimizer:
    """``--optim`` wrapped so that W follows the change of B A (Zi et al. 2023)."""
    from ..optim import DeltaLoRA

    start = math.ceil(DELTA_START * steps) if config.delta_start is None else config.delta_start
    inner = plain(model, args, config, steps, head_rate)
    optimizer: Optimizer = DeltaLoRA(inner, model, c=config.delta_scale or 0.0, start_step=start)
    return optimizer


def _named(args: TrainingArguments, model: Any, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer that ``--optim`` names, as transformers' Trainer would build it."""
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    optimizer: Optimizer = kind(groups, **options)
    return optimizer
