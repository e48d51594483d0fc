"""LoraFastCallback in transformers' Trainer, and in TRL's: training is as without it, but fused."""

from __future__ import annotations

import functools
import logging
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_all_accurate
from datasets import Dataset
from lora_models import counted
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import lora_fast
from lora_fast import LoraFastCallback

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "sft_trl.py"
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


def tokenizer() -> PreTrainedTokenizerFast:
    """SFTTrainer wants one, although the examples are tokens."""
    letters = {chr(ord("a") + number): number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(letters, [])), pad_token="a", eos_token="b"
    )


def train(
    out: Path,
    *,
    fused: bool = False,
    wide: bool = False,
    model: Any = None,
    resume: Path | None = None,
    sft: bool = False,
    **arguments: Any,
) -> Run:
    """Train a tiny model; `wide` is the same computation in float64, `sft` is by TRL."""
    options = {"learning_rate": 0.02, "optim": "adamw_torch", **arguments}
    if wide:
        options.pop("bf16", None)
    model = model or tiny_model()
    kind: type[Trainer] = Trainer
    config: type[TrainingArguments] = TrainingArguments
    others: dict[str, Any] = {}
    if sft:
        kind, config = SFTTrainer, SFTConfig
        # TRL's defaults are others than transformers'.
        options = {"bf16": False, "gradient_checkpointing": False, **options}
        options["dataset_kwargs"] = {"skip_prepare_dataset": True}
        others["processing_class"] = tokenizer()
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
        train_dataset=Dataset.from_list(examples()),
        eval_dataset=Dataset.from_list(examples()[:BATCH]),
        data_collator=collate,
        callbacks=[LoraFastCallback()] if fused else [],
        **others,
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


def assert_alike(fused: Run, without: tuple[Run, Run], *, bf16: bool = False) -> None:
    if not bf16:
        assert_all_accurate(fused.result(), *(run.result() for run in without))
        return
    # Six steps of rounded gradients: stock's parameters are not within the ceiling, either.
    losses = [{"losses": run.losses} for run in (fused, *without)]
    assert_all_accurate(*losses, compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("setting", SETTINGS)
def test_trains_as_the_trainer_does_without_it(
    setting: str, without: Callable[[str], tuple[Run, Run]], tmp_path: Path
) -> None:
    fused = train(tmp_path, fused=True, **SETTINGS[setting])
    assert counted(fused.model) == (LINEARS * STEPS + MORE_CALLS.get(setting, 0), {})
    # Checkpoints, of activations or on disk, change no number.
    same_as = setting if setting in ("bf16", "group_by_length") else "plain"
    assert_alike(fused, without(same_as), bf16=setting == "bf16")


@pytest.mark.parametrize(
    ("settings", "same_as"),
    [
        (("gradient_checkpointing, reentrant", "group_by_length"), "group_by_length"),
        (("gradient_checkpointing, not reentrant", "bf16"), "bf16"),
    ],
    ids=["reentrant and group_by_length", "not reentrant and bf16"],
)
def test_trl_trains_as_the_trainer_does(
    settings: tuple[str, ...],
    same_as: str,
    without: Callable[[str], tuple[Run, Run]],
    tmp_path: Path,
) -> None:
    options = {name: value for setting in settings for name, value in SETTINGS[setting].items()}
    fused = train(tmp_path, fused=True, sft=True, **options)
    more = sum(MORE_CALLS.get(setting, 0) for setting in settings)
    assert counted(fused.model) == (LINEARS * STEPS + more, {})
    assert_alike(fused, without(same_as), bf16=same_as == "bf16")


def test_trl_loads_the_best_model_and_resumes(
    without: Callable[[str], tuple[Run, Run]], tmp_path: Path
) -> None:
    """Where more loss counts as better, the best model is the first that was saved."""
    options = {**SETTINGS["load_best_model_at_end"], "greater_is_better": True}
    whole = train(tmp_path / "whole", fused=True, sft=True, **options)
    assert whole.trainer.state.best_global_step == 2
    assert whole.trainer.evaluate()["eval_loss"] == whole.trainer.state.best_metric
    # Once each two steps, and once just now.
    assert counted(whole.model) == (LINEARS * (STEPS + STEPS // 2 + 1), {})
    resumed = train(
        tmp_path / "resumed", fused=True, sft=True, resume=tmp_path / "whole" / "checkpoint-4"
    )
    assert torch.equal(resumed.losses, whole.losses)
    assert_alike(resumed, without("plain"))
    assert counted(resumed.model) == (LINEARS * (STEPS - 4), {})


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


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of them found."""
    script, out = Path(__file__).with_name("ddp_trainer.py"), tmp_path_factory.mktemp("ddp")
    env = {**os.environ, "PYTHONPATH": str(script.parents[1]), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, str(script), str(out)], check=True, timeout=300, env=env)
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


def test_two_processes_of_ddp_train_as_one(
    two_processes: list[dict[str, Any]], without: Callable[[str], tuple[Run, Run]]
) -> None:
    """The Trainer wraps the model in DistributedDataParallel before training begins."""
    found = two_processes[0]
    assert found["wrapped"] == "DistributedDataParallel"
    assert found["calls"] == (LINEARS * STEPS, {})
    assert_all_accurate(found["result"], *(run.result() for run in without("plain")))


def test_two_processes_of_the_example_have_the_losses_of_one(
    two_processes: list[dict[str, Any]],
) -> None:
    (status, printed), second = (found["example"] for found in two_processes)
    assert (status, second) == (0, (0, "")), "the first process alone prints"
    assert "14 of 14 adapted layers fused; 130 fused calls, 0 fallback calls" in printed
    losses = re.findall(r"^loss (\S+) → (\S+) (in|without) (.+)$", printed, re.MULTILINE)
    assert [ending for *_, ending in losses] == ["2 processes", "lora_fast"]
    _, alone = runpy.run_path(str(EXAMPLE))["train"](None, 5, fused=True)
    for first, last, *_ in losses:
        assert [float(first), float(last)] == pytest.approx([alone[0], alone[-1]], rel=1e-4)
