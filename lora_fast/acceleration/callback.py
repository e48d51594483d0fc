"""Acceleration for transformers' Trainer and trainers built on it, such as TRL's."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from ..optional_packages import needed
from .pitfalls import pitfalls
from .report import Report, adapted_layers, report
from .switch import accelerate, check_switches

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    TrainerCallback = needed("transformers", "LoraFastCallback").TrainerCallback

logger = logging.getLogger("lora_fast.callback")  # as documented, wherever this file lies


class LoraFastCallback(TrainerCallback):
    """Accelerates the model that a Trainer holds when training starts.

        SFTTrainer(model, peft_config=LoraConfig(), callbacks=[LoraFastCallback()], ...)

    ``group_shared_inputs``, ``fuse_mlp`` and ``decode_int8`` are those of
    :func:`lora_fast.accelerate`. The model stays accelerated after training; checkpoints are PEFT's
    own, and a run may be resumed with or without it.

    The main process logs :func:`lora_fast.report` at level INFO of the logger
    ``lora_fast.callback``, at the start as a prediction and at the end with all calls counted; at
    level WARNING when layers or calls fall back to PEFT's own forward, or when the model has no
    adapted layer and stays unchanged. At the start it warns, in a line each, of what the model and
    its adapters would do without a word (:mod:`lora_fast.acceleration.pitfalls`). If nothing
    handles INFO, as in a plain script, it prints one line at the start instead, like Trainer's
    losses.

    Raises TypeError if one of them is not a bool.
    """

    def __init__(
        self,
        *,
        group_shared_inputs: bool = True,
        fuse_mlp: bool = True,
        decode_int8: bool = False,
    ) -> None:
        self.options = {
            "group_shared_inputs": group_shared_inputs,
            "fuse_mlp": fuse_mlp,
            "decode_int8": decode_int8,
        }
        check_switches(**self.options)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        if next(adapted_layers(model), None) is None:
            logger.warning("the model has no adapted layers: nothing to accelerate")
            return
        accelerate(model, **self.options)
        found = report(model)
        _log(found, state)
        if state.is_world_process_zero:
            for line in pitfalls(model, **_circumstances(args)):
                logger.warning("%s", line)
        silent = found.all_fused and not logger.isEnabledFor(logging.INFO)
        if silent and state.is_world_process_zero:
            print(f"lora_fast: {len(found.layers)} adapted layers run fused")

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        found = report(model)
        if found.layers:
            _log(found, state)


def _circumstances(args: Any) -> dict[str, Any]:
    """The dtype of autocast and whether the loss is fused, by the arguments of a Trainer."""
    autocast = torch.bfloat16 if getattr(args, "bf16", False) else None
    if getattr(args, "fp16", False):
        autocast = torch.float16
    return {"autocast": autocast, "fused_loss": bool(getattr(args, "use_liger_kernel", False))}


def _log(found: Report, state: Any) -> None:
    if state.is_world_process_zero:
        logger.log(logging.INFO if found.all_fused else logging.WARNING, "%s", found)
