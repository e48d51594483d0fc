"""LoraFastCallback in transformers' Trainer: training is as without it, but fused."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_all_accurate
from lora_models import counted
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lora_fast
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
    **arguments: Any,
) -> Run:
    """Train a tiny model; `wide` is the same computation in float64."""
    options = {"learning_rate": 0.02, "optim": "adamw_torch", **arguments}
    if wide:
        options.pop("bf16", None)
    model = model or tiny_model()
    trainer = Trainer(
        model=model.double() if wide else model,
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=STEPS,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **{"save_strategy": "no", "per_device_train_batch_size": BATCH, **options},
        ),
        train_dataset=examples(),
        eval_dataset=examples()[:BATCH],
        data_collator=collate,
        callbacks=[LoraFastCallback()] if fused else [],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(trainer, torch.tensor(losses, dtype=torch.float64 if wide else torch.float32))


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
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
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


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Run, Run]]:
    """(float64, stock) runs of the same computation, each trained once."""

    @functools.cache
    def runs(same_as: str) -> tuple[Run, Run]:
        out = tmp_path_factory.mktemp("without")
        wide, stock = (train(out, wide=wide, **SETTINGS[same_as]) for wide in (True, False))
        assert stock.losses[-1] < 0.95 * stock.losses[0], "the model must learn something"
        assert counted(stock.model) == (0, {})
        return wide, stock

    return runs


def assert_alike(fused: Run, without: tuple[Run, Run]) -> None:
    assert_all_accurate(fused.result(), *(run.result() for run in without))


@pytest.mark.parametrize("setting", SETTINGS)
def test_trains_as_the_trainer_does_without_it(
    setting: str, without: Callable[[str], tuple[Run, Run]], tmp_path: Path
) -> None:
    fused = train(tmp_path, fused=True, **SETTINGS[setting])
    assert counted(fused.model) == (LINEARS * STEPS + MORE_CALLS.get(setting, 0), {})
    if setting == "bf16":
        # Six steps of rounded gradients: stock's parameters are not within the ceiling, either.
        losses = [{"losses": run.losses} for run in (fused, *without(setting))]
        assert_all_accurate(*losses, compute_dtype=torch.bfloat16)
    else:
        # Checkpoints, of activations or on disk, change no number.
        assert_alike(fused, without("group_by_length" if setting == "group_by_length" else "plain"))


def test_the_best_model_is_loaded(tmp_path: Path) -> None:
    """Where more loss counts as better, the best model is the first that was saved."""
    options = {**SETTINGS["load_best_model_at_end"], "greater_is_better": True}
    trainer = train(tmp_path, fused=True, **options).trainer
    assert trainer.state.best_global_step == 2
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    assert lora_fast.report(trainer.model).all_fused


def test_a_stock_checkpoint_is_resumed_fused(
    without: Callable[[str], tuple[Run, Run]], tmp_path: Path
) -> None:
    train(tmp_path / "stock", save_strategy="steps", save_steps=3)
    fused = train(tmp_path / "fused", fused=True, resume=tmp_path / "stock" / "checkpoint-3")
    assert_alike(fused, without("plain"))
    assert counted(fused.model) == (LINEARS * (STEPS - 3), {})


def test_the_report_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lora_fast.callback"):
        train(tmp_path, fused=True)
    before, after = (r for r in caplog.records if r.name == "lora_fast.callback")
    assert {before.levelno, after.levelno} == {logging.INFO}
    assert f"{LINEARS} of {LINEARS} adapted layers fused; 0 fused calls" in before.getMessage()
    assert f"{LINEARS * STEPS} fused calls, 0 fallback calls" in after.getMessage()


def test_layers_that_fall_back_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    model.base_model.model.lm_head.register_forward_hook(lambda *_: None)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.base_layer.register_forward_hook(lambda *_: None)
    train(tmp_path, fused=True, model=model)
    before, after = (r for r in caplog.records if r.name == "lora_fast.callback")
    assert {before.levelno, after.levelno} == {logging.WARNING}
    assert "fallback: hooks on base layer" in before.getMessage()
    assert f"{STEPS} × hooks on base layer" in after.getMessage()


def test_other_models_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompt = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    run = train(tmp_path, fused=True, model=tiny_model(prompt))
    messages = [r.getMessage() for r in caplog.records if r.name == "lora_fast.callback"]
    assert messages == ["the model has no adapted layers: nothing to accelerate"]
    assert run.losses.isfinite().all()


def test_groups_are_as_asked() -> None:
    class Sibling(nn.Module):
        """What the Trainer hands over: a wrapper around the PEFT model."""

        def __init__(self) -> None:
            super().__init__()
            self.module = tiny_model()

    for grouped in (True, False):
        wrapped = Sibling()
        callback = LoraFastCallback(group_shared_inputs=grouped)
        state = type("State", (), {"is_world_process_zero": False})
        callback.on_train_begin(None, state, None, model=wrapped)
        assert lora_fast.report(wrapped).all_fused
        assert any("_lora_fast_group" in vars(m) for m in wrapped.modules()) is grouped
    with pytest.raises(TypeError, match="group_shared_inputs must be a bool, got int"):
        LoraFastCallback(group_shared_inputs=1)


def test_two_processes_of_ddp_train_as_one(
    without: Callable[[str], tuple[Run, Run]], tmp_path: Path
) -> None:
    """The Trainer wraps the model in DistributedDataParallel before training begins."""
    script, out = Path(__file__).with_name("ddp_trainer.py"), tmp_path / "found.pt"
    env = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    subprocess.run([sys.executable, str(script), str(out)], check=True, timeout=300, env=env)
    found = torch.load(out)
    assert found["wrapped"] == "DistributedDataParallel"
    assert found["calls"] == (LINEARS * STEPS, {})
    assert_all_accurate(found["result"], *(run.result() for run in without("plain")))
