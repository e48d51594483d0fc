"""Short runs of transformers' Trainer, or of one that is built on it, on a tiny Llama."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lora_models import counted
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from bench.instruments.accuracy import assert_all_accurate
from lora_fast import LoraFastCallback

STEPS, BATCH, EXAMPLES, VOCABULARY = 6, 4, 24, 32
LAYERS, LINEARS = 2, 7 * 2


@dataclass(frozen=True)
class Run:
    """A finished training and the losses of its steps."""

    trainer: Trainer
    losses: Tensor

    @property
    def model(self) -> Any:
        return self.trainer.model

    def result(self) -> dict[str, Tensor]:
        """The losses and every trained parameter."""
        trained = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        return {"losses": self.losses, **trained}


def tiny_model(adapter: Any = None) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
    )
    adapter = adapter or LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=8, target_modules="all-linear"
    )
    return get_peft_model(LlamaForCausalLM(config), adapter)


def examples() -> list[dict[str, list[int]]]:
    """Sequences that count up, of differing length."""
    rows = []
    for index in range(EXAMPLES):
        tokens = [(index + position) % VOCABULARY for position in range(4 + index % 7)]
        rows.append({"input_ids": tokens, "labels": tokens})
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

    ids = padded("input_ids", 0)
    labels = padded("labels", -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}


def train(
    out: Path,
    *,
    fused: bool = False,
    wide: bool = False,
    model: Any = None,
    resume: Path | None = None,
    kind: type[Trainer] = Trainer,
    config: type[TrainingArguments] = TrainingArguments,
    dataset: Callable[[list[Any]], Any] = list,
    others: dict[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    **arguments: Any,
) -> Run:
    """Train a tiny model; `wide` is the same computation in float64.

    `kind` is the trainer, which is made with a `config` and `others`; it wants data as `dataset`
    makes it of a list.
    """
    # transformers 4 leaves it there for every later trainer of the process.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    options = {"learning_rate": 0.02, "optim": "adamw_torch", **arguments}
    if wide:
        options.pop("bf16", None)
    model = model or tiny_model()
    if options.get("gradient_checkpointing"):
        # What transformers 5 does by itself: reentrant checkpoints want an input with a gradient.
        model.enable_input_require_grads()
    trainer = kind(
        model=model.double() if wide else model,
        args=config(
            output_dir=str(out),
            max_steps=STEPS,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **{"save_strategy": "no", "per_device_train_batch_size": BATCH, **options},
        ),
        train_dataset=dataset(examples()),
        eval_dataset=dataset(examples()[:BATCH]),
        data_collator=collate,
        callbacks=[LoraFastCallback()] if fused else list(callbacks),
        **(others or {}),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(trainer, torch.tensor(losses, dtype=torch.float64 if wide else torch.float32))


# Before transformers 5 it was an option of its own.
FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
BY_LENGTH = {"train_sampling_strategy": "group_by_length", "group_by_length": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient_checkpointing, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "gradient_checkpointing, not reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    # AdamW starts with the sign of each gradient, which makes whole steps of bfloat16 rounding.
    "bf16": {"bf16": True, "optim": "sgd", "learning_rate": 0.5},
    "group_by_length": {name: BY_LENGTH[name] for name in BY_LENGTH.keys() & FIELDS},
    "load_best_model_at_end": {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    },
}


# Fused calls beside one of each layer in each step.
MORE_CALLS = {
    "gradient_checkpointing, reentrant": LINEARS * STEPS,
    # Stops when all that backward needs is there again: before down_proj.
    "gradient_checkpointing, not reentrant": (LINEARS - LAYERS) * STEPS,
    "load_best_model_at_end": LINEARS * (STEPS // 2),
}


def two_processes(out: Path, *example: Path) -> list[Any]:
    """What each of two processes found that ran ddp_trainer.py."""
    script = Path(__file__).with_name("ddp_trainer.py")
    env = {**os.environ, "PYTHONPATH": str(script.parents[2]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), str(out), *map(str, example)]
    subprocess.run(command, check=True, timeout=300, env=env)
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


def stock_runs(out: Path, setting: str) -> tuple[Run, Run]:
    """(float64, stock) runs of the same computation."""
    wide, stock = (train(out, wide=wide, **SETTINGS[setting]) for wide in (True, False))
    assert stock.losses[-1] < 0.95 * stock.losses[0], "the model must learn something"
    assert counted(stock.model) == (0, {})
    return wide, stock


def assert_alike(fused: Run, without: tuple[Run, Run], *, bf16: bool = False) -> None:
    if not bf16:
        assert_all_accurate(fused.result(), *(run.result() for run in without))
        return
    # Six steps of rounded gradients: stock's parameters are not within the ceiling, either.
    losses = [{"losses": run.losses} for run in (fused, *without)]
    assert_all_accurate(*losses, compute_dtype=torch.bfloat16)
