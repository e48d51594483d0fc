"""One arm of a run: transformers' Trainer over a PEFT model, with our order, clocks and stops."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.training_args import OptimizerNames

from .callbacks import Progress, StepClock, StopRequest, stop_on_signals
from .checkpoints import CHECKPOINTS, STATE, latest_checkpoint, step_of
from .config import WARMUP, TrainConfig
from .data import Collator, Example, LengthGroupedOrder
from .errors import Interrupted, TrainingError, first_line
from .events import Observer

DEFAULT_CHECKPOINTS = 5


@dataclass(frozen=True)
class Arm:
    """What the training of one arm, ``stock`` or ``lora_fast``, gave. ``losses`` is per step."""

    name: str
    losses: list[float]
    step_seconds: list[float]
    tokens_per_second: float


class OrderedTrainer(Trainer):
    """Trainer with the batches of :class:`LengthGroupedOrder`, whose log has unrounded losses."""

    _step_loss: float | torch.Tensor = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on one batch and add its share to the loss of the optimizer step."""
        loss = super().training_step(*args, **kwargs)
        self._step_loss = self._step_loss + loss
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the loss as it is: transformers before 5.0 rounds it to four digits."""
        if "loss" in logs:
            logs["loss"] = float(self._step_loss)
            self._step_loss = 0.0
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedOrder:
        lengths = [len(example["input_ids"]) for example in self.train_dataset]
        step_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedOrder(lengths, step_size, self.args.seed)


def train_arm(
    name: str,
    model: Any,
    examples: list[Example],
    collator: Collator,
    config: TrainConfig,
    out: Path,
    dtype: torch.dtype,
    observer: Observer,
) -> Arm:
    """Train ``model`` in place, from the arm's last checkpoint if it has one.

    Raises:
        Interrupted: the user asked to stop; a checkpoint is written.
        TrainingError: the loss is no longer a number, or the optimizer's package is absent.
    """
    folder = out / CHECKPOINTS / name
    clock, request = StepClock(), StopRequest()
    callbacks: list[TrainerCallback] = [clock, Progress(name, observer, clock), request]
    checkpoint = latest_checkpoint(folder)
    steps = total_steps(config, len(examples))
    if checkpoint is not None and step_of(checkpoint) >= steps:
        return _finished_arm(name, model, checkpoint)
    try:
        trainer = OrderedTrainer(
            model=model,
            args=training_arguments(config, folder, steps, dtype),
            train_dataset=examples,
            data_collator=collator,
            processing_class=collator.tokenizer,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.create_optimizer()
    except (ValueError, ImportError, RuntimeError) as error:
        raise TrainingError(f"cannot set up training: {first_line(error)}") from error
    with stop_on_signals(request, observer):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    if state.global_step < state.max_steps:
        written = latest_checkpoint(folder)
        raise Interrupted(out, step_of(written) if written else None)
    return Arm(name, _losses(state.log_history), clock.seconds, clock.tokens_per_second())


def training_arguments(
    config: TrainConfig, folder: Path, steps: int, dtype: torch.dtype
) -> TrainingArguments:
    """Return the Trainer's arguments for ``steps`` steps of a configuration without unknowns."""
    checkpointing: dict[str, Any] = {}
    if config.gradient_checkpointing:
        checkpointing["gradient_checkpointing"] = True
        checkpointing["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size or 1,
        gradient_accumulation_steps=config.grad_accum,
        **checkpointing,
        learning_rate=config.lr or 0.0,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(WARMUP * steps),
        optim=config.optim,
        weight_decay=0.0,
        seed=config.seed,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="steps",
        save_steps=config.save_every or max(1, math.ceil(steps / DEFAULT_CHECKPOINTS)),
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # DataParallel would replicate the quantised model at every step
    return arguments


def check_optimizer(name: str, device: torch.device) -> None:
    """Check that transformers has the optimizer and that the device can run it.

    Raises:
        TrainingError: it has not, or cannot.
    """
    known = [optimizer.value for optimizer in OptimizerNames]
    if name not in known:
        raise TrainingError(f"--optim must be one of {', '.join(known)}, got {name!r}")
    if name.startswith("paged_") and device.type == "cpu":
        raise TrainingError(f"--optim {name} needs a GPU: it pages its state between GPU and CPU")


def total_steps(config: TrainConfig, examples: int) -> int:
    """Return the number of optimizer steps of a configuration without unknowns."""
    if config.steps is not None:
        return config.steps
    per_epoch = math.ceil(math.ceil(examples / (config.batch_size or 1)) / config.grad_accum)
    return max(1, math.ceil(per_epoch * (config.epochs or 1.0)))


def _finished_arm(name: str, model: Any, checkpoint: Path) -> Arm:
    """Take over the weights and the curve of a training that had ended before."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
    state = json.loads((checkpoint / STATE).read_text())
    return Arm(name, _losses(state["log_history"]), [], 0.0)


def _losses(history: list[dict[str, float]]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]
