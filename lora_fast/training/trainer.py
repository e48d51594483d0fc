"""One arm of a run: transformers' Trainer with our order of examples, clocks and stops."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.training_args import OptimizerNames

from ..errors import Interrupted, TrainingError, first_line
from ..methods.table import method_of
from .callbacks import (
    BestCheckpoint,
    CallCounter,
    Progress,
    RankAllocation,
    StepClock,
    StopRequest,
    early_stopping,
    stop_on_signals,
)
from .checkpoints import (
    CHECKPOINTS,
    WEIGHTS,
    damaged_checkpoints,
    latest_checkpoint,
    step_of,
    stored_attributes,
    stored_state,
)
from .config import TrainConfig
from .data import LengthGroupedOrder
from .effective_rank import EffectiveRanks, Ranks
from .events import Observer
from .experiment import Experiment
from .weights import capture, restore, save_weights

DEFAULT_CHECKPOINTS = 5
EARLY = "EarlyStoppingCallback"
SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Arm:
    """The results of training one arm, ``stock`` or ``lora_fast``.

    ``losses`` is per step, ``ranks`` the effective ranks by step; ``best_step`` is the step that
    early stopping restored, ``planned`` the number of steps that were planned.
    """

    name: str
    losses: list[float]
    step_seconds: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    ranks: list[tuple[int, Ranks]] = field(default_factory=list)
    best_step: int | None = None
    planned: int = 0

    def course(self) -> str:
        """How many steps ran, and what early stopping did."""
        done = len(self.losses)
        text = f"{done:,} steps"
        if done < self.planned:
            text += f" of {self.planned:,}, stopped early"
        if self.best_step is not None:
            text += f"; the weights of step {self.best_step:,} are kept, the best on the examples"
            text += " held back"
        return text


class OrderedTrainer(Trainer):
    """Trainer with the batches of :class:`LengthGroupedOrder` and unrounded losses in its log.

    A checkpoint holds what training changed, whatever the method, and no other part of the model.
    """

    _step_loss: float | torch.Tensor = 0.0
    changes_weights = False

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on one batch and add its share to the loss of the optimizer step."""
        loss = super().training_step(*args, **kwargs)
        self._step_loss = self._step_loss + loss
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the unrounded loss: transformers before 5.0 rounds it to four digits."""
        if "loss" in logs:
            logs["loss"] = float(self._step_loss)
            self._step_loss = 0.0
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedOrder:
        lengths = [len(example["input_ids"]) for example in self.train_dataset]
        step_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedOrder(lengths, step_size, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(capture(self.model, frozen=self.changes_weights), folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        try:
            restore(self.model, Path(resume_from_checkpoint) / WEIGHTS)
        except ValueError as error:
            raise TrainingError(
                f"cannot resume from step {step_of(Path(resume_from_checkpoint))}: "
                f"{first_line(error)}"
            ) from error

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def train_arm(
    name: str,
    setting: Experiment,
    out: Path,
    observer: Observer,
) -> Arm:
    """Train the model in place, from the arm's last checkpoint if it has one.

    Raises Interrupted: the user asked to stop (a checkpoint is written); TrainingError: the loss is
    no longer a number, or the optimizer's package is absent.
    """
    folder = out / CHECKPOINTS / name
    checkpoint = latest_checkpoint(folder)
    for damaged, lack in damaged_checkpoints(folder).items():
        instead = f"from step {step_of(checkpoint)}" if checkpoint else "from the beginning"
        observer.note(f"{damaged} is incomplete ({lack}): continuing {instead}")
    if checkpoint is not None and _has_ended(checkpoint, setting):
        return _told(_finished_arm(name, setting, checkpoint), observer)
    request, ranks = StopRequest(), EffectiveRanks()
    clock, calls = _resumed_counts(setting.model, checkpoint)
    stored = stored_attributes(checkpoint, EffectiveRanks.__name__)
    ranks.history = [(step, found) for step, found in stored.get("history", [])]
    callbacks = [clock, calls, Progress(name, observer, clock), request, ranks]
    trainer = _build_trainer(setting, folder, callbacks, checkpoint)
    with stop_on_signals(request, observer):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    if request.asked and state.global_step < state.max_steps:
        written = latest_checkpoint(folder)
        raise Interrupted(out, step_of(written) if written else None)
    best = state.best_model_checkpoint if setting.config.early_stopping else None
    arm = Arm(
        name,
        _losses(state.log_history),
        clock.seconds,
        clock.tokens_per_second(),
        ranks.history,
        step_of(Path(best)) if best else None,
        setting.steps,
    )
    return _told(arm, observer)


def _told(arm: Arm, observer: Observer) -> Arm:
    if arm.best_step is not None:
        observer.note(f"{arm.course()}.")
    return arm


def _build_trainer(
    setting: Experiment,
    folder: Path,
    callbacks: list[TrainerCallback],
    checkpoint: Path | None,
) -> OrderedTrainer:
    config, model = setting.config, setting.model
    method = method_of(config)
    if method.allocates_rank:
        callbacks = [RankAllocation(), *callbacks]
    if config.early_stopping:
        stored = stored_attributes(checkpoint, EARLY)
        callbacks = [*callbacks, BestCheckpoint(), early_stopping(config.early_stopping, stored)]
    try:
        args = training_arguments(config, folder, setting.steps, setting.base.dtype)
        optimizer = method.optimize(model, args, config, setting.steps, method.head_rate)
        trainer = OrderedTrainer(
            model=model,
            args=args,
            train_dataset=setting.train,
            eval_dataset=setting.validation or None,
            data_collator=setting.collator,
            processing_class=setting.collator.tokenizer,
            callbacks=callbacks,
            optimizers=(optimizer, None),
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise TrainingError(f"cannot set up training: {first_line(error)}") from error
    trainer.changes_weights = method.changes_weights
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(
    config: TrainConfig, folder: Path, steps: int, dtype: torch.dtype
) -> TrainingArguments:
    """The Trainer's arguments for ``steps`` steps of a configuration without unknowns."""
    checkpointing: dict[str, Any] = {}
    if config.gradient_checkpointing:
        checkpointing["gradient_checkpointing"] = True
        checkpointing["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    save_every = config.save_every or max(1, math.ceil(steps / DEFAULT_CHECKPOINTS))
    stopping: dict[str, Any] = {}
    if config.early_stopping:
        stopping = {
            "eval_strategy": "steps",
            "eval_steps": save_every,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "greater_is_better": False,
            "per_device_eval_batch_size": config.batch_size or 1,
            "prediction_loss_only": True,
        }
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size or 1,
        gradient_accumulation_steps=config.grad_accum,
        **checkpointing,
        learning_rate=config.lr or 0.0,
        lr_scheduler_type=SCHEDULERS[config.schedule],
        warmup_steps=math.ceil(config.warmup * steps),
        optim=config.optim or "adamw_torch",
        weight_decay=0.0,
        seed=config.seed,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        **stopping,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # DataParallel would replicate the quantised model at every step
    return arguments


def check_optimizer(name: str | None, device: torch.device) -> None:
    """Check that transformers has the optimizer and that the device can run it.

    Raises TrainingError: either is not the case.
    """
    if name is None:
        return
    known = [optimizer.value for optimizer in OptimizerNames]
    if name not in known:
        raise TrainingError(f"--optim must be one of {', '.join(known)}, got {name!r}")
    if name.startswith("paged_") and device.type == "cpu":
        raise TrainingError(f"--optim {name} needs a GPU: it pages its state between GPU and CPU")


def total_steps(config: TrainConfig, examples: int) -> int:
    """The number of optimizer steps of a configuration without unknowns."""
    if config.steps is not None:
        return config.steps
    per_epoch = math.ceil(math.ceil(examples / (config.batch_size or 1)) / config.grad_accum)
    return max(1, math.ceil(per_epoch * (config.epochs or 1.0)))


def _has_ended(checkpoint: Path, setting: Experiment) -> bool:
    """Whether the training that wrote ``checkpoint`` had finished, or stopped early."""
    if step_of(checkpoint) >= setting.steps:
        return True
    count = stored_attributes(checkpoint, EARLY).get("early_stopping_patience_counter", 0)
    return bool(setting.config.early_stopping and count >= setting.config.early_stopping)


def _finished_arm(name: str, setting: Experiment, checkpoint: Path) -> Arm:
    """Restore the weights, the curve and the counts of a training that had already ended."""
    state = stored_state(checkpoint)
    best = state.get("best_model_checkpoint")
    # By name, since the folder of the run may have moved.
    source = checkpoint.with_name(Path(best).name) if best else checkpoint
    restore(setting.model, source / WEIGHTS)
    history = stored_attributes(checkpoint, EffectiveRanks.__name__).get("history", [])
    clock, _ = _resumed_counts(setting.model, checkpoint)
    return Arm(
        name,
        _losses(state["log_history"]),
        clock.seconds,
        clock.tokens_per_second(),
        ranks=[(step, found) for step, found in history],
        best_step=step_of(source) if best else None,
        planned=setting.steps,
    )


def _resumed_counts(model: Any, checkpoint: Path | None) -> tuple[StepClock, CallCounter]:
    """The clock, and the counts of the model's layers, restored from ``checkpoint``."""
    return (
        StepClock(stored_attributes(checkpoint, StepClock.__name__)),
        CallCounter(model, stored_attributes(checkpoint, CallCounter.__name__)),
    )


def _losses(history: list[dict[str, float]]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]
