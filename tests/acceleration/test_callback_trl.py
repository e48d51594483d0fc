"""LoraFastCallback in TRL's SFTTrainer, and the example with it."""

from __future__ import annotations

import functools
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from lora_models import counted
from tokenizers import Tokenizer, models
from trainer_runs import (
    LINEARS,
    MORE_CALLS,
    SETTINGS,
    STEPS,
    VOCABULARY,
    Run,
    assert_alike,
    stock_runs,
    train,
    two_processes,
)
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "sft_trl.py"
pytestmark = pytest.mark.skipif(
    trl.__version__.startswith("1.15.") and not torch.cuda.is_available(),
    reason="TRL 1.15 computes its loss by Triton wherever that is installed, and so on GPUs alone",
)


def tokenizer() -> PreTrainedTokenizerFast:
    """SFTTrainer requires one, although the examples are tokens."""
    letters = {chr(ord("a") + number): number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(letters, [])), pad_token="a", eos_token="b"
    )


def train_with_trl(out: Path, **arguments: Any) -> Run:
    return train(
        out,
        fused=True,
        kind=SFTTrainer,
        config=SFTConfig,
        dataset=Dataset.from_list,
        others={"processing_class": tokenizer()},
        dataset_kwargs={"skip_prepare_dataset": True},
        # TRL's defaults differ from transformers'.
        **{"bf16": False, "gradient_checkpointing": False, **arguments},
    )


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Run, Run]]:
    """(float64, stock) runs of the same computation by transformers' Trainer, each trained once."""
    return functools.cache(lambda same_as: stock_runs(tmp_path_factory.mktemp("without"), same_as))


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
    fused = train_with_trl(tmp_path, **options)
    more = sum(MORE_CALLS.get(setting, 0) for setting in settings)
    assert counted(fused.model) == (LINEARS * STEPS + more, {})
    assert_alike(fused, without(same_as), bf16=same_as == "bf16")


def test_trl_loads_the_best_model_and_resumes(
    without: Callable[[str], tuple[Run, Run]], tmp_path: Path
) -> None:
    """Where more loss counts as better, the best model is the first that was saved."""
    options = {**SETTINGS["load_best_model_at_end"], "greater_is_better": True}
    whole = train_with_trl(tmp_path / "whole", **options)
    assert whole.trainer.state.best_global_step == 2
    assert whole.trainer.evaluate()["eval_loss"] == whole.trainer.state.best_metric
    # Once each two steps, and once just now.
    assert counted(whole.model) == (LINEARS * (STEPS + STEPS // 2 + 1), {})
    resumed = train_with_trl(tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(resumed.losses, whole.losses)
    assert_alike(resumed, without("plain"))
    assert counted(resumed.model) == (LINEARS * (STEPS - 4), {})


def test_two_processes_of_the_example_have_the_losses_of_one(tmp_path: Path) -> None:
    (status, printed), second = two_processes(tmp_path, EXAMPLE)
    assert (status, second) == (0, (0, "")), "the first process alone prints"
    assert "14 of 14 adapted layers fused; 130 fused calls, 0 fallback calls" in printed
    losses = re.findall(r"^loss (\S+) → (\S+) (in|without) (.+)$", printed, re.MULTILINE)
    assert [ending for *_, ending in losses] == ["2 processes", "lora_fast"]
    _, alone = runpy.run_path(str(EXAMPLE))["train"](None, 5, fused=True)
    for first, last, *_ in losses:
        assert [float(first), float(last)] == pytest.approx([alone[0], alone[-1]], rel=1e-4)


def test_the_example_has_the_losses_of_stock(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, "--smoke"])
    assert runpy.run_path(str(EXAMPLE))["main"]() == 0
    printed = capsys.readouterr().out
    # Checkpointing recomputes all layers of a block but the last.
    assert "14 of 14 adapted layers fused; 130 fused calls, 0 fallback calls" in printed
    first, last = re.search(r"^loss (\S+) → (\S+) in one process$", printed, re.MULTILINE).groups()
    assert float(last) < 0.7 * float(first)
    apart = re.search(r"largest relative difference of a step's loss (\S+),", printed).group(1)
    assert float(apart) <= 1e-4
